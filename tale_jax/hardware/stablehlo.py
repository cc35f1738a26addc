"""Would a plugin for Apple GPUs support every operation of our programs? Answered on any machine, without the plugin.

JAX can lower a program for a platform that this machine lacks (`lowering_platforms`). The StableHLO says which
operations the plugin would get, of which types, and from which line of ours. This proves that all are supported, not
that the numbers are correct: `planning/numerics.py` checks that on the machine itself.

    program = check_program("train", lowered.compiler_ir("stablehlo"), "mps")
"""

import collections
import dataclasses
import functools
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Operations without work for the device.
STRUCTURAL_OPERATIONS = re.compile(r"builtin\.module|func\.\w+|sdy\.\w+|(stablehlo|mhlo)\.return")
PACKAGE_LINE = re.compile(r'"[^"]*(tale_jax/[\w/]+\.py)":(\d+)')
TYPE_OF_64_BITS = re.compile(r"tensor<(?:[\d?]+x)*(f64|u?i64|complex<\w+>)")


@dataclasses.dataclass(frozen=True)
class Program:
    """What one compiled function needs from a platform.

    Attributes:
      name: init, train, score, load, prefill or decode.
      operations: name → how many there are (a loop's body counts once).
      num_assumed: how many of them the plugin does not name, but JAX is assumed to lower to others before it.
      faults: one line for each operation that the plugin would refuse, with the line of source it comes from.
    """

    name: str
    operations: Mapping[str, int]
    num_assumed: int
    faults: tuple[str, ...]


def check_program(name: str, module: Any, platform: str) -> Program:
    """Compares the operations of a StableHLO module (an MLIR object) with those that `platform` is known to support."""
    known, assumed = known_operations()[platform], known_operations()["assumed"]
    counts: collections.Counter[str] = collections.Counter()
    faults: dict[str, None] = {}
    operations = list(_walk(module.operation))
    calls = {str(op.attributes["callee"]).lstrip("@"): op for op in operations if op.name == "func.call"}
    for op in operations:
        if STRUCTURAL_OPERATIONS.fullmatch(op.name):
            continue
        counts[op.name] += 1
        for fault in _faults(op, known | assumed):
            faults[f"{name} for {platform}: {op.name} at {source_line(op, calls)}: {fault}"] = None
    return Program(name, dict(counts), sum(counts[op] for op in counts if op not in known), tuple(faults))


@functools.cache
def known_operations() -> dict[str, frozenset[str]]:
    """Platform → full names of the operations its plugin names; "assumed" → those that JAX is assumed to lower before.

    From `metal_operations.toml`.
    """
    table = tomllib.loads((Path(__file__).parent / "metal_operations.toml").read_text())
    return {
        platform: frozenset(
            f"{dialect}.{name}" for dialect, names in lists.items() if dialect != "plugin" for name in names.split()
        )
        for platform, lists in table.items()
    }


def source_line(op: Any, calls: Mapping[str, Any]) -> str:
    """The innermost line of this package that an operation comes from, such as tale_jax/model/layers.py:42.

    `calls`: function name → a call of it. JAX makes functions of some of its own operations, so that only the calls of
    these functions have a line of ours.
    """
    while not (found := PACKAGE_LINE.search(str(op.location))):
        while op.name != "func.func" and op.parent is not None:
            op = op.parent
        if op.name != "func.func" or (name := str(op.attributes["sym_name"]).strip('"')) not in calls:
            return "no line of tale_jax"
        op = calls[name]
    return f"{found[1]}:{found[2]}"


def _faults(op: Any, known: frozenset[str]) -> Iterator[str]:
    """What a plugin that knows the operations `known` would refuse about an operation."""
    if op.name not in known:
        yield "is not among the operations that the plugin names"
    if op.name == "stablehlo.custom_call":
        yield f"calls {op.attributes['call_target_name']}, which no plugin is known to have"
    types = [str(value.type) for value in (*op.operands, *op.results)]
    yield from (f"has a 64-bit tensor, {kind}" for kind in dict.fromkeys(types) if TYPE_OF_64_BITS.match(kind))
    if op.name == "stablehlo.dot_general":
        numbers = str(op.attributes["dot_dimension_numbers"])
        if "batching" in numbers and len(_dimensions(numbers, "lhs_contracting_dimensions")) > 1:
            yield f"contracts more than one dimension in a batched product ({numbers})"
    if op.name == "stablehlo.scatter" and len(op.results) > 1:
        yield "scatters into more than one array"
    if op.name == "stablehlo.gather":
        last = str(op.operands[1].type).partition("<")[2].count("x") - 1
        index = re.search(r"index_vector_dim = (\d+)", str(op.attributes["dimension_numbers"]))
        if index is None or int(index[1]) < last:
            yield "does not have the index vector as its last dimension"
    if op.name == "stablehlo.reduce_window":
        yield "is only known to work for pooling"


def _dimensions(text: str, name: str) -> list[int]:
    found = re.search(rf"{name} = \[([\d, ]*)\]", text)
    return [int(number) for number in found[1].split(",")] if found and found[1] else []


def _walk(op: Any) -> Iterator[Any]:
    yield op
    for region in op.regions:
        for block in region:
            for inner in block:
                yield from _walk(inner.operation)
