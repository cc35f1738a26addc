"""What a run would take on many devices, answered on a machine that has none of them.

The training step is compiled ahead of time for devices that XLA simulates on the CPU, in another process, from shapes
alone: no weight is made. Memory is what the compiler says, products and communication are read from the compiled
program (`compiled.py`), and their time follows from three numbers about the devices.

    python launch/plan.py --config=configs/gpt2.py:1b --devices=64 --config.mesh.fsdp=64
"""

import dataclasses
import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import rich.box
import rich.table

from tale_jax.config import UNKNOWN_TOTAL_STEPS, Config
from tale_jax.hardware import machine
from tale_jax.hardware.backend import for_platform, start_backend
from tale_jax.hardware.sharding import mesh_sizes
from tale_jax.model.transformer import count_parameters, flops_per_token
from tale_jax.planning.compiled import read_work
from tale_jax.planning.memory import measure_memory
from tale_jax.planning.plan import count_windows
from tale_jax.planning.programs import UntrainedTokenizer
from tale_jax.training.step import make_trainer
from tale_jax.utils.files import json_line
from tale_jax.utils.format import format_bytes, format_duration
from tale_jax.utils.progress import Progress
from tale_jax.utils.streams import table_console
from tale_jax.utils.subprocesses import run_module

DEVICE_COUNT_FLAG = "xla_force_host_platform_device_count"
# The program is never run, so no time goes into its machine code; this changes neither its operations nor its memory.
UNRUN_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
MIN_SHOWN_BYTES = 1e5  # of what is sent
SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What is taken for granted of the devices.

    Attributes:
      peak_tflops: 10^12 FLOP/s of large products in the run's dtype, by the data sheet of a device.
      peak_share: which share of that products reach in training.
      bandwidth: 10^9 bytes per second that a device sends to the others.

    Raises ValueError, in one line, for what is no speed.
    """

    peak_tflops: float
    peak_share: float
    bandwidth: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"--{name}={value} must be a positive number; leave it out for that of an A100")


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device during a step, by the compiler.

    Attributes:
      arguments: the state and the batch; `weights`, `optimizer` and `ema` are parts of them.
      temporaries: gradients, activations and the like.
      results: what is returned in new memory: nothing but metrics where the state is updated in place.
    """

    arguments: int
    temporaries: int
    results: int
    weights: int
    optimizer: int
    ema: int

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.results


@dataclasses.dataclass(frozen=True)
class Communication:
    """Operations of one kind along the same axes of the mesh, in one step.

    Attributes:
      kind: as XLA names it.
      axes: of the mesh.
      times: how often one runs.
      array_bytes: of the arrays that are gathered, summed or exchanged, on one device.
      sent_bytes: that one device sends, where the devices form rings.
    """

    kind: str
    axes: tuple[str, ...]
    times: int
    array_bytes: int
    sent_bytes: int


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiled training step says of itself; work and memory are those of one device."""

    precision: str
    parameters: int
    memory: DeviceMemory
    matmul_flops: int
    communication: tuple[Communication, ...]
    unknown_loops: int
    compile_seconds: float
    compile_bytes: int

    @property
    def sent_bytes(self) -> int:
        return sum(each.sent_bytes for each in self.communication)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Time on paper. A step takes its products and its communication one after the other; `hidden_` is of a step that
    hides the shorter of the two behind the longer one. Days are None where the length of the run is not known."""

    compute_seconds: float
    communication_seconds: float
    step_seconds: float
    tokens_per_second: float
    days: float | None
    hidden_step_seconds: float
    hidden_tokens_per_second: float
    hidden_days: float | None


@dataclasses.dataclass(frozen=True)
class DevicePlan:
    """A run on so many devices.

    Attributes:
      mesh: axis → devices along it.
      model_flops: of a step, which the model needs by its definition (`flops_per_token`).
      matmul_flops: of a step, which all devices do together: with what is recomputed, and done more than once.
      budget_bytes: memory of a device; 0: not given.
    """

    devices: int
    mesh: dict[str, int]
    tokens_per_step: int
    total_steps: int | None
    tokens: int | None
    model_flops: int
    matmul_flops: int
    step: CompiledStep
    peak_bytes: int
    sent_bytes: int
    budget_bytes: int
    fits: bool
    assumptions: Assumptions
    throughput: Throughput


def plan_devices(
    config: Config, num_devices: int, assumptions: Assumptions, budget: int = 0, workdir: Path | None = None
) -> DevicePlan:
    """The plan of a config on `num_devices` devices, which need not be here.

    Args:
      budget: bytes of a device; 0: whatever it takes.
      workdir: where its text is prepared, which tells the length of a pass; None: nowhere.

    Raises:
      ValueError: one line, where the mesh does not fit the devices, or the step cannot be compiled here.
    """
    config = config.with_total_steps(count_windows(config, workdir) if workdir else 0)
    mesh = mesh_sizes(config, num_devices)
    title = f"compiling the training step for {num_devices} simulated devices"
    with Progress("plan", total=1, unit="stages") as progress, progress.stage(title):
        step = _compile_elsewhere(config, num_devices)
    total_steps = config.total_steps if config.total_steps < UNKNOWN_TOTAL_STEPS else None
    tokens = config.tokens_per_step
    return DevicePlan(
        devices=num_devices,
        mesh=mesh,
        tokens_per_step=tokens,
        total_steps=total_steps,
        tokens=total_steps and total_steps * tokens,
        model_flops=flops_per_token(config.model, config.tokenizer.vocab_size) * tokens,
        matmul_flops=step.matmul_flops * num_devices,
        step=step,
        peak_bytes=step.memory.peak,
        sent_bytes=step.sent_bytes,
        budget_bytes=budget,
        fits=not budget or step.memory.peak <= budget,
        assumptions=assumptions,
        throughput=throughput(step.matmul_flops, step.sent_bytes, tokens, total_steps, assumptions),
    )


def throughput(
    flops: int, sent_bytes: int, tokens: int, total_steps: int | None, assumptions: Assumptions
) -> Throughput:
    """The time of a step of `tokens` tokens in which each device does `flops` and sends `sent_bytes`."""
    compute = flops / (assumptions.peak_tflops * 1e12 * assumptions.peak_share)
    communication = sent_bytes / (assumptions.bandwidth * 1e9)
    step, hidden = compute + communication, max(compute, communication)
    days = total_steps / SECONDS_PER_DAY if total_steps else math.nan
    return Throughput(
        compute_seconds=compute,
        communication_seconds=communication,
        step_seconds=step,
        tokens_per_second=tokens / step,
        days=days * step if total_steps else None,
        hidden_step_seconds=hidden,
        hidden_tokens_per_second=tokens / hidden,
        hidden_days=days * hidden if total_steps else None,
    )


def _compile_elsewhere(config: Config, num_devices: int) -> CompiledStep:
    """`compile_step` in a process that has so many simulated devices: XLA decides their number when it starts."""
    flags = re.sub(rf"--{DEVICE_COUNT_FLAG}=\d*", "", os.environ.get("XLA_FLAGS", ""))
    env = {"XLA_FLAGS": f"{flags} {UNRUN_FLAGS} --{DEVICE_COUNT_FLAG}={num_devices}".strip(), "JAX_PLATFORMS": "cpu"}
    result = run_module("tale_jax.planning.devices", stdin=json.dumps(config.to_json()), env=env)
    if result.reason:
        less = "" if config.model.scan_layers else "--config.model.scan_layers=True compiles one layer for all, or "
        raise ValueError(
            f"the step could not be compiled for --devices={num_devices} here ({result.reason}); "
            f"try less: {less}fewer devices with the same mesh.fsdp and mesh.tensor"
        )
    values = result.json()
    communication = tuple(Communication(**each | {"axes": tuple(each["axes"])}) for each in values["communication"])
    return CompiledStep(**values | {"memory": DeviceMemory(**values["memory"]), "communication": communication})


def compile_step(config: Config) -> CompiledStep:
    """Compiles the training step of a config of known length for the devices of this process, all simulated ones.

    The program is that of GPUs, but compiled by XLA's compiler for CPUs. Where the config leaves the dtype to the
    machine it is float32, which takes the most memory.
    """
    start_time = time.monotonic()
    backend = for_platform(start_backend("cpu"), "cuda")
    precision = "float32" if config.precision == "auto" else config.precision
    trainer = make_trainer(config, backend, jnp.dtype(precision), UntrainedTokenizer.bos_id)
    compiled = trainer.compile()
    seconds = time.monotonic() - start_time
    work, mesh = read_work(compiled.as_text()), mesh_sizes(config, len(backend.devices))
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for each in work.collectives:
        if axes := each.axes(mesh):
            added = each.times, each.times * each.array_bytes, each.times * each.sent_bytes
            sums[each.kind, axes] = [a + b for a, b in zip(sums[each.kind, axes], added, strict=True)]
    memory, analysis = measure_memory(config, trainer, compiled, backend), compiled.memory_analysis()
    params = trainer.abstract_state.base.base if trainer.abstract_state.base else trainer.abstract_state.params
    return CompiledStep(
        precision=precision,
        parameters=count_parameters(params),
        memory=DeviceMemory(
            analysis.argument_size_in_bytes,
            analysis.temp_size_in_bytes,
            memory.results,
            memory.weights,
            memory.optimizer,
            memory.ema,
        ),
        matmul_flops=work.matmul_flops,
        communication=tuple(
            Communication(kind, axes, int(times), int(size), round(sent))
            for (kind, axes), (times, size, sent) in sorted(sums.items(), key=lambda item: -item[1][2])
        ),
        unknown_loops=work.unknown_loops,
        compile_seconds=seconds,
        compile_bytes=machine.peak_resident_memory(),
    )


# ---------------------------------------------------------------------------------------------------------------- text


def tell_device_plan(
    config: Config,
    num_devices: int,
    assumptions: Assumptions,
    workdir: Path | None,
    budget: int,
    others: Mapping[str, bool],
    as_json: bool,
) -> None:
    """Prints the plan of a config on `num_devices` devices, as tables or as one JSON object.

    Args:
      others: flags of plan.py that ask something of this machine → whether they are given.

    Raises:
      ValueError: in one line, for a flag that does not go with `--devices`, and as `plan_devices`.
    """
    if wrong := [name for name, given in others.items() if given]:
        raise ValueError(f"--devices={num_devices} plans for devices that are not here; leave --{wrong[0]} out")
    plan = plan_devices(config, num_devices, assumptions, budget, workdir)
    if as_json:
        print(json_line(dataclasses.asdict(plan)))
    else:
        print_device_plan(plan)


def print_device_plan(plan: DevicePlan) -> None:
    """Prints the plan as tables."""
    console, step, memory = table_console(), plan.step, plan.step.memory
    given = plan.assumptions
    unknown = "known when the text is prepared (or set total_steps)"
    ratio = plan.matmul_flops / plan.model_flops
    rows = {
        "devices": f"{plan.devices}: " + ", ".join(f"{size} along {name}" for name, size in plan.mesh.items()),
        "precision": step.precision,
        "parameters": f"{step.parameters:,}",
        "length": f"{plan.total_steps:,} steps, {plan.tokens:,} tokens" if plan.total_steps else unknown,
        "a step": f"{plan.tokens_per_step:,} tokens",
        "products": f"{_format_flops(plan.matmul_flops)} a step, {_format_flops(step.matmul_flops)} of each device",
        "of these": f"{_format_flops(plan.model_flops)} by the model's definition; devices do {ratio:.2f} times that",
        "compiled": f"here, for simulated devices, in {format_duration(step.compile_seconds)} "
        f"and {format_bytes(step.compile_bytes)}",
    }
    if step.unknown_loops:
        rows["counted once"] = f"what stands in {step.unknown_loops} loops whose length the program does not say"
    _print_rows(console, "The run", rows)

    held = {"weights": memory.weights, "optimizer": memory.optimizer, "average of the weights": memory.ema}
    held["batch and counters"] = memory.arguments - sum(held.values())
    held |= {"temporaries": memory.temporaries, "results": memory.results}
    table = rich.table.Table(box=rich.box.SIMPLE, title="Memory of a device", title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    for name, size in held.items():
        if size >= MIN_SHOWN_BYTES:
            table.add_row(name, format_bytes(size))
    table.add_section()
    table.add_row("peak", format_bytes(memory.peak))
    console.print(table)
    if plan.budget_bytes:
        verdict = "It fits" if plan.fits else "It does not fit"
        console.print(f"{verdict}: {format_bytes(plan.peak_bytes)} of {format_bytes(plan.budget_bytes)}.")

    table = rich.table.Table(box=rich.box.SIMPLE, title="Communication in a step", title_justify="left")
    for column in ("kind", "along", "times", "arrays", "a device sends"):
        table.add_column(column, justify="left" if column in ("kind", "along") else "right")
    for each in step.communication:
        if each.sent_bytes >= MIN_SHOWN_BYTES:
            sizes = format_bytes(each.array_bytes), format_bytes(each.sent_bytes)
            table.add_row(each.kind, ", ".join(each.axes), f"{each.times:,}", *sizes)
    table.add_section()
    table.add_row("together", "", "", "", format_bytes(plan.sent_bytes))
    console.print(table)

    paper = plan.throughput
    assumed = f"{given.peak_share:.0%} of {given.peak_tflops:g} TFLOP/s (--peak_share, --peak_tflops)"
    rows = {
        "compute": f"{_format_seconds(paper.compute_seconds)}, at {assumed}",
        "communication": f"{_format_seconds(paper.communication_seconds)}, at {given.bandwidth:g} GB/s (--bandwidth)",
        "one after the other": _speed(paper.step_seconds, paper.tokens_per_second, paper.days),
        "if the shorter hides": _speed(paper.hidden_step_seconds, paper.hidden_tokens_per_second, paper.hidden_days),
    }
    _print_rows(console, "A step on paper", rows)


def _print_rows(console: Any, title: str, rows: dict[str, str]) -> None:
    table = rich.table.Table(box=rich.box.SIMPLE, show_header=False, title=title, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _speed(seconds: float, tokens_per_second: float, days: float | None) -> str:
    whole = f", {days:,.2f} days for the run" if days is not None else ""
    return f"{_format_seconds(seconds)}, {tokens_per_second:,.0f} tokens/s{whole}"


def _format_flops(flops: float | int) -> str:
    return f"{flops / 1e12:,.1f} TFLOP" if flops >= 1e12 else f"{flops / 1e9:,.1f} GFLOP"


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


if __name__ == "__main__":
    print(json_line(dataclasses.asdict(compile_step(Config.from_json(json.load(sys.stdin))))))
