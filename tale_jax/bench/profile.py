"""The time of a training step by part: the blocks' products, attention, head and loss, optimizer, norms, the rest.

A few steps run under `jax.profiler`. Each event of its trace has the name of an instruction of the compiled program,
whose `op_name` says which module of the model it came from. An instruction that fuses several modules counts for the
last of them. Where a backend's traces do not name instructions, that is an error.
"""

import dataclasses
import gzip
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from tale_jax.bench.throughput import Bench

NUM_STEPS = 3
CONTAINERS = ("while", "call", "conditional")  # the instructions inside them are counted instead
# The first pattern found in an op_name decides; an op_name without any of these names comes after the gradient.
PARTS = (
    ("blocks: products", r"/(query|key|value|output|gate|up|down|\w*qkv\w*|gate_up)/.*(dot|matmul|transpose)"),
    ("blocks: norms", r"norm"),
    ("blocks: attention core", r"attention"),
    ("blocks: rest", r"blocks|mlp"),
    ("embedding", r"_take|gather|scatter"),
    ("head and loss", r"Transformer|jvp|transpose\(|while/body"),
    ("optimizer", r""),
)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Milliseconds of one step by part, and the instructions that took longest: (name, part, op_name, ms)."""

    parts: dict[str, float]
    longest: tuple[tuple[str, str, str, float], ...]

    def record(self) -> dict[str, Any]:
        total = sum(self.parts.values()) or 1.0
        parts = {part: {"ms": ms, "share": ms / total} for part, ms in self.parts.items()}
        names = ("instruction", "part", "op_name", "ms")
        return {"profile": parts, "longest": [dict(zip(names, row, strict=True)) for row in self.longest]}

    def tables(self) -> list[Table]:
        shares = Table("part of a training step", "ms", "share", box=None, header_style="bold")
        total = sum(self.parts.values())
        for part, ms in sorted(self.parts.items(), key=lambda item: -item[1]):
            shares.add_row(part, f"{ms:,.1f}", f"{ms / total:.1%}")
        longest = Table("longest instructions", "part", "ms", "from", box=None, header_style="bold")
        for name, part, op_name, ms in self.longest:
            longest.add_row(name, part, f"{ms:,.1f}", op_name[-60:])
        return [shares, longest]


def part_of(op_name: str) -> str:
    """The part of the step that an instruction belongs to, by its `op_name`."""
    return next(part for part, pattern in PARTS if re.search(pattern, op_name))


def profile(bench: Bench, num_longest: int = 12) -> Profile:
    """The profile of a config's training step. Raises ValueError when this backend's traces name no instruction."""
    state = bench.trainer.init()
    op_names = instruction_op_names(bench.trainer.compile().as_text() or "")
    state = bench.step(bench.step(state))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(NUM_STEPS):
                state = bench.step(state)
        [trace] = Path(folder).rglob("perfetto_trace.json.gz")
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    milliseconds = Counter[str]()
    for event in events:
        if event.get("ph") == "X" and event["name"] in op_names:
            milliseconds[event["name"]] += event["dur"] / 1e3 / NUM_STEPS
    if not milliseconds:
        raise ValueError(
            f"--profile needs traces that name instructions, and {bench.backend.platform} gives none; "
            "try --config.backend.platform=cpu"
        )
    parts = Counter[str]()
    for name, ms in milliseconds.items():
        parts[part_of(op_names[name])] += ms
    longest = [
        (name, part_of(op_names[name]), op_names[name], ms) for name, ms in milliseconds.most_common(num_longest)
    ]
    return Profile(dict(parts), tuple(longest))


def instruction_op_names(hlo: str) -> dict[str, str]:
    """Instruction → its `op_name` ("" if none) in a compiled program, containers left out."""
    op_names = {}
    for line in hlo.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = .*?[\])}] ([\w\-]+)\(", line)
        if match and match[2] not in CONTAINERS:
            op_name = re.search(r'op_name="([^"]*)"', line)
            op_names[match[1]] = op_name[1] if op_name else ""
    return op_names
