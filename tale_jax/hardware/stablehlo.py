"""Would an Apple GPU plugin know every operation of our programs? Read from their lowered text, on any machine.

JAX lowers a program for a platform that is not here (`lowering_platforms`), and the result tells which operations that
plugin would be asked for, of which types, and from which line of ours. This proves coverage; that the numbers are right
is for `planning/numerics.py` to find out on the machine itself.

    program = inspect("train", lowered.compiler_ir("stablehlo"), "mps")
"""

import collections
import dataclasses
import functools
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

STRUCTURE = re.compile(r"builtin\.module|func\.\w+|sdy\.\w+|(stablehlo|mhlo)\.return")  # no work for the device
OWN_LINE = re.compile(r'"[^"]*(tale_jax/[\w/]+\.py)":(\d+)')
WIDE_TYPE = re.compile(r"tensor<(?:[\d?]+x)*(f64|u?i64|complex<\w+>)")


@dataclasses.dataclass(frozen=True)
class Program:
    """What one compiled function asks of a platform.

    Attributes:
      name: init, train, score, load, prefill or decode.
      operations: name → how often it stands in the text (a loop's body once).
      believed: how many of them are on no list, but believed to be taken apart before the plugin sees them.
      faults: one line for each thing that the plugin would refuse, with the line of source it comes from.
    """

    name: str
    operations: Mapping[str, int]
    believed: int
    faults: tuple[str, ...]


def inspect(name: str, module: Any, platform: str) -> Program:
    """Holds a StableHLO module (an MLIR object) against what `platform` is known to take."""
    known, believed = known_operations()[platform], known_operations()["believed"]
    counts: collections.Counter[str] = collections.Counter()
    faults: dict[str, None] = {}
    found = list(_walk(module.operation))
    calls = {str(op.attributes["callee"]).lstrip("@"): op for op in found if op.name == "func.call"}
    for op in found:
        if STRUCTURE.fullmatch(op.name):
            continue
        counts[op.name] += 1
        for fault in _faults(op, known | believed):
            faults[f"{name} for {platform}: {op.name} at {source_line(op, calls)}: {fault}"] = None
    return Program(name, dict(counts), sum(counts[op] for op in counts if op not in known), tuple(faults))


@functools.cache
def known_operations() -> dict[str, frozenset[str]]:
    """Platform → full names of the operations its plugin names; "believed" → those that JAX takes apart before."""
    table = tomllib.loads((Path(__file__).parent / "metal_operations.toml").read_text())
    return {
        platform: frozenset(
            f"{dialect}.{name}" for dialect, names in lists.items() if dialect != "plugin" for name in names.split()
        )
        for platform, lists in table.items()
    }


def source_line(op: Any, calls: Mapping[str, Any]) -> str:
    """The innermost line of this package that an operation comes from, as tale_jax/model/layers.py:42.

    `calls` are the calls of the module's functions by name: JAX shares the functions it makes of its own operations, so
    that only their calls know a line of ours.
    """
    while not (found := OWN_LINE.search(str(op.location))):
        while op.name != "func.func" and op.parent is not None:
            op = op.parent
        if op.name != "func.func" or (name := str(op.attributes["sym_name"]).strip('"')) not in calls:
            return "no line of tale_jax"
        op = calls[name]
    return f"{found[1]}:{found[2]}"


def _faults(op: Any, known: frozenset[str]) -> Iterator[str]:
    if op.name not in known:
        yield "is not among the operations that the plugin names"
    if op.name == "stablehlo.custom_call":
        yield f"calls {op.attributes['call_target_name']}, which no plugin is known to have"
    types = [str(value.type) for value in (*op.operands, *op.results)]
    yield from (f"has a 64-bit tensor, {kind}" for kind in dict.fromkeys(types) if WIDE_TYPE.match(kind))
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
