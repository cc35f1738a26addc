"""What a device multiplies and sends in one run of a compiled program, read from the program's text.

XLA's own cost analysis counts the body of a loop once; here what stands in a loop (the layers of `scan_layers`,
micro-batches) counts as often as the loop runs.

    work = read_work(compiled.as_text())
    work.matmul_flops, sum(each.sent_bytes for each in work.collectives)
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tale_jax.planning.memory import array_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Attributes that name the computations that an operation runs.
CALLS = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)
AXES = re.compile(
    r"'([^']*)'(?::\((\d+)\)(\d+))?"
)  # an axis, or a part: its size times what lies before it in the axis


class Collective(NamedTuple):
    """An operation in which devices send each other parts of arrays, and how often it runs.

    Attributes:
      kind: one of KINDS.
      array_bytes: on one device, of what is gathered, summed or exchanged, whole, each time.
      sent_bytes: by one device, each time, as a ring of devices does it (a mean over devices).
      groups: the devices of each group; of a collective-permute, each pair of source and target.
      times: how often it runs.
    """

    kind: str
    array_bytes: int
    sent_bytes: float
    groups: tuple[tuple[int, ...], ...]
    times: int

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh (name → size, the last one's devices neighbours) along which devices talk."""
        groups = [np.unravel_index(group, tuple(mesh.values())) for group in self.groups]
        return tuple(
            name for axis, name in enumerate(mesh) if any(len(set(places[axis].tolist())) > 1 for places in groups)
        )


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in one run of a program.

    Attributes:
      matmul_flops: of its matrix products, a multiplication and an addition counted as two.
      collectives: what it sends, in the order in which it stands there.
      unknown_loops: loops whose length the program does not say; what stands in them is counted once.
    """

    matmul_flops: int
    collectives: tuple[Collective, ...]
    unknown_loops: int


class Operation(NamedTuple):
    """One line of a program: name, type of the result, operation, what it is of, and all that follows."""

    name: str
    type: str
    kind: str
    arguments: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """The names of the operations whose results it takes."""
        return re.findall(r"%([\w.\-]+)", self.arguments)


def read_work(hlo: str) -> Work:
    """The work of one device in the optimised program `hlo` (of `compiled.as_text()`). All branches count."""
    computations, entry = _read_computations(hlo)
    types = {operation.name: operation.type for operations in computations.values() for operation in operations}
    header = hlo.partition("\n")[0]
    num_devices = math.prod(int(count) for count in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header))

    @functools.cache
    def work_of(name: str) -> tuple[int, Counter[Collective], int]:
        flops, collectives, unknown = 0, Counter[Collective](), 0
        for operation in computations[name]:
            flops += _dot_flops(operation, types)
            if collective := _collective(operation, types, num_devices):
                collectives[collective] += 1
            times = _loop_length(operation, computations) if operation.kind == "while" else 1
            unknown += not times
            for called in _called(operation):
                more_flops, more, more_unknown = work_of(called)
                flops += (times or 1) * more_flops
                unknown += more_unknown
                for each, count in more.items():
                    collectives[each] += (times or 1) * count
        return flops, collectives, unknown

    flops, collectives, unknown = work_of(entry)
    return Work(flops, tuple(each._replace(times=times) for each, times in collectives.items()), unknown)


def _read_computations(hlo: str) -> tuple[dict[str, list[Operation]], str]:
    """The operations of every computation, by its name, and the name of the one that is the program."""
    computations: dict[str, list[Operation]] = {}
    entry, current = "", []
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = ", line):
            rest = line[match.end() :]
            end = _closing(rest[1:]) + 2 if rest.startswith("(") else rest.index(" ")
            kind, _, after = rest[end:].strip().partition("(")
            arguments = after[: _closing(after)]
            current.append(Operation(match[1], rest[:end], kind, arguments, after[len(arguments) + 1 :]))
    return computations, entry


def _closing(text: str) -> int:
    """Where the parenthesis closes that was opened before the text."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _called(operation: Operation) -> Iterator[str]:
    """The computations that an operation runs, but for the condition of a loop."""
    for names in CALLS.findall(operation.rest):
        yield from re.findall(r"%([\w.\-]+)", names)


def _loop_length(loop: Operation, computations: Mapping[str, list[Operation]]) -> int:
    """How often a loop runs; 0 where the program does not say it.

    XLA writes it down; otherwise it is the constant that the condition compares with, since JAX counts from 0.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    condition = re.search(r"\bcondition=%([\w.\-]+)", loop.rest)
    operations = computations[condition[1]] if condition else []
    bounds = [each.arguments for each in operations if each.kind == "constant" and re.match(r"[su]\d+\[\]", each.type)]
    return int(bounds[0]) if len(bounds) == 1 else 0


def _dot_flops(operation: Operation, types: Mapping[str, str]) -> int:
    """Of a matrix product; 0 for other operations."""
    if operation.kind != "dot":
        return 0
    left = _dims(types[operation.operands[0]])
    axes = re.search(r"\blhs_contracting_dims=\{([\d,]*)\}", operation.rest)
    terms = math.prod(left[int(axis)] for axis in axes[1].split(",") if axis) if axes else 1
    return 2 * math.prod(_dims(operation.type)) * terms


def _dims(type: str) -> list[int]:
    """The sizes of an array of the type f32[2,3]{1,0}."""
    return [int(size) for size in type.partition("[")[2].partition("]")[0].split(",") if size]


def _type_bytes(type: str) -> int:
    """Bytes of an array, or of several."""
    return sum(array_bytes(*array) for array in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type) if array[0] != "token")


def _collective(operation: Operation, types: Mapping[str, str], num_devices: int) -> Collective | None:
    """What an operation, or the start of an asynchronous one, sends; None where it sends nothing."""
    kind = operation.kind.removesuffix("-start")
    if kind not in KINDS:
        return None
    size = sum(_type_bytes(types[name]) for name in operation.operands)
    if kind == "collective-permute":
        pairs = re.search(r"\bsource_target_pairs=\{([\d,{}]*)\}", operation.rest)
        groups = _listed_groups(pairs[1]) if pairs else ()
        moved = sum(len(set(pair)) > 1 for pair in groups)
        return Collective(kind, size, size * moved / num_devices, groups, 1)
    groups = _groups(operation.rest, num_devices)
    count = len(groups[0])
    if kind == "all-gather":
        size *= count
    rounds = 2 if kind == "all-reduce" else 1
    return Collective(kind, size, rounds * size * (count - 1) / count, groups, 1)


def _groups(rest: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of devices of a collective, however they are written."""
    everyone = (tuple(range(num_devices)),)
    if listed := re.search(r"\breplica_groups=\{([\d,{}]*)\}", rest):
        return _listed_groups(listed[1]) or everyone
    if counted := re.search(r"\breplica_groups=\[([\d,]+)\](<=\[\S*)", rest):
        return _rows(_counted(counted[2]).reshape(_numbers(counted[1])))
    if by_axes := re.search(r"\breplica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", rest):
        return _groups_by_axes(by_axes[1], by_axes[2], by_axes[3])
    return everyone


def _listed_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Of {0,1},{2,3}."""
    return tuple(_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text))


def _counted(text: str) -> np.ndarray:
    """Devices in the order that <=[2,4]T(1,0) gives them: counted on a grid, whose axes are then exchanged."""
    grid, _, axes = text.partition("]")
    shape = _numbers(grid.lstrip("<=["))
    order = re.match(r"T\(([\d,]+)\)", axes)
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose(_numbers(order[1])) if order else devices


def _groups_by_axes(mesh: str, devices: str, chosen: str) -> tuple[tuple[int, ...], ...]:
    """Of mesh['data'=2,'fsdp'=4] {'fsdp'}: the groups along some axes, or along a part of one, as 'fsdp':(2)2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    parts = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in AXES.findall(chosen)]
    shape: list[int] = []
    moved: dict[tuple[str, int], int] = {}  # which axis of the grid a part is
    for name, size in sizes.items():
        mine = sorted((before, width) for other, before, width in parts if other == name)
        done = 1
        for before, width in mine:
            shape += [before // done, width]
            moved[name, before] = len(shape) - 1
            done = before * width
        shape.append(size // done)
    counted = re.search(r"(\[[\d,]+\](?:T\([\d,]+\))?)", devices)
    order = _counted(counted[1]) if counted else np.arange(math.prod(sizes.values()))
    last = [moved[name, before] for name, before, _ in parts]
    first = [axis for axis in range(len(shape)) if axis not in last]
    grid = order.reshape(shape).transpose(first + last)
    return _rows(grid.reshape(-1, math.prod(shape[axis] for axis in last)))


def _rows(array: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in array.tolist())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
