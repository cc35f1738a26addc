"""Does a run fit, how long will it take, and what would make it fit? Answered before any data or step.

Memory comes from the compiler: the very step that the Trainer jits is compiled, and its own analysis says what it holds
for its arguments and for everything in between. On a CPU the peak is that of the process: what it holds by now (Python,
the libraries, compiled programs), plus the program, or what is on its way into a checkpoint while steps wait. Time
comes from a few real steps on random tokens.

    python launch/plan.py --config=configs/m2_air.py --memory=8GB
"""

import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table

from tale_jax import backend as backends
from tale_jax import machine
from tale_jax.audit import Untrained, programs
from tale_jax.checkpoint import Checkpoints, bytes_at_once
from tale_jax.config import Config
from tale_jax.data import cut, window_starts
from tale_jax.machine import format_bytes
from tale_jax.model.transformer import Cache, count_parameters, flops_per_token
from tale_jax.probe import choose_precision
from tale_jax.text.windows import load_tokens
from tale_jax.training.schedule import phases
from tale_jax.training.step import Trainer, make_trainer

# On a CPU, measured (plan.py --table). Programs that come later stay in memory: for initial weights, scoring and
# decoding, and layers that were unrolled; freed arrays leave gaps. XLA's bfloat16 kernels keep float32 buffers that the
# compiler does not count, where they sum more than 256 terms. Arrays on their way to a checkpoint are also compressed.
PROGRAMS = 110 << 20  # bytes
UNROLLED = 6 << 20  # bytes a layer
GAPS = 0.25  # of the state
KERNELS, TERMS = 0.45, 256  # of the results of such products, in float32
CHECKPOINT = 1.5  # of the bytes written at once
STEPS = 4  # of the short run; the first is not counted

CHANGES: tuple[dict[str, Any], ...] = (
    {"model.scan_layers": True},
    {"precision": "bfloat16"},
    {"micro_batch_size": 2},  # divides it
    {"remat": "dots_with_no_batch_dims_saveable"},
    {"remat": "block"},
    {"remat": "block", "model.scan_layers": True},
    {"micro_batch_size": 4},
    {"micro_batch_size": 2, "remat": "block", "model.scan_layers": True},
    {"micro_batch_size": 8, "remat": "block", "model.scan_layers": True},
    {"micro_batch_size": 1 << 30, "remat": "block", "model.scan_layers": True},
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device (on a CPU: of the process) while training, by part.

    Attributes:
      weights, optimizer, average, batch: what a step is given, as the compiler has it.
      gradients, logits, activations: of what it holds in between; gradients are as large as the weights, logits the
        largest array along the vocabulary, activations the rest.
      results: what a step returns besides its arguments' memory: as much as they, where nothing is donated.
      decode_cache: keys and values of the samples along training; not held during a step.
      process: Python, libraries, compiled programs; checkpoint: what is on its way to the disk while steps wait. Both
        0 on a GPU.
      peak: the most at any time.
    """

    weights: int
    optimizer: int
    average: int
    batch: int
    gradients: int
    logits: int
    activations: int
    results: int
    decode_cache: int
    process: int
    checkpoint: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings that make a run fit, and what they cost: the share of tokens a second that is left (above 1: faster)."""

    settings: dict[str, Any]
    peak_bytes: int
    tokens_per_second: float
    speed: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will be. Times are 0 and advice is empty where nothing was measured; None is what data must tell."""

    platform: str
    device: str
    precision: str
    precision_reason: str
    parameters: int
    embedding_parameters: int
    flops_per_token: int
    tokens_per_step: int
    total_steps: int | None
    tokens: int | None
    passes: float | None
    tokens_per_parameter: float | None
    memory: Memory
    peak_bytes: int
    budget_bytes: int
    fits: bool
    checkpoint_bytes: int
    disk_bytes: int
    tokens_per_second: float = 0.0
    seconds: float | None = None
    advice: tuple[Change, ...] = ()


def plan_run(
    config: Config, trainer: Trainer, here: backends.Backend, budget: int, why: str, num_windows: int = 0
) -> Plan:
    """Plans a planned config; compiles its step, which `trainer` then runs. `num_windows` of text: 0 if unknown."""
    memory = measure_memory(config, trainer, here)
    sizes = {name: _bytes(part) for name, part in vars(trainer.abstract_state).items()}
    state, params = sum(sizes.values()), trainer.abstract_state.params
    count, embedding = count_parameters(params), params["embedding"].size
    known = bool(num_windows) or config.total_steps < _UNKNOWN
    tokens = config.total_steps * config.tokens_per_step if known else None
    return Plan(
        platform=here.platform,
        device=here.device,
        precision=jnp.dtype(trainer.model.dtype).name,
        precision_reason=why,
        parameters=count,
        embedding_parameters=embedding,
        flops_per_token=flops_per_token(config.model, config.tokenizer.vocab_size),
        tokens_per_step=config.tokens_per_step,
        total_steps=config.total_steps if known else None,
        tokens=tokens,
        passes=config.total_steps * config.batch_size / num_windows if num_windows else None,
        tokens_per_parameter=tokens / count if tokens else None,
        memory=memory,
        peak_bytes=memory.peak,
        budget_bytes=budget,
        fits=not budget or memory.peak <= budget,
        checkpoint_bytes=state,
        disk_bytes=state * (config.checkpoint.keep + 2),  # the best one, and one that is being written
    )


def make_for_a_mac(config: Config, here: backends.Backend, workdir: str = "", memory: int = 0) -> Plan:
    """`make` for the GPU of a Mac with so many bytes of memory (0: 8 GB), on any machine.

    The step is the one that a Metal plugin would be given, compiled here instead: what it holds is the same, but for
    how well each compiler reuses memory. Nothing is timed. The dtype is float32 unless the config names another, since
    which one is right and fast is for the probe to find out there.
    """
    there = backends.as_on_a_mac(here, memory or 8 * 10**9)
    dtype = "float32" if config.precision == "auto" else config.precision
    why = "the probe will choose there" if config.precision == "auto" else "as the config says"
    return make(config, there, workdir, timed=False, precision=(dtype, why))


def make(
    config: Config,
    here: backends.Backend,
    workdir: str = "",
    budget: int = 0,
    timed: bool = True,
    precision: tuple[Any, str] | None = None,
) -> Plan:
    """The whole plan of a config, as launch/plan.py shows it: with its time, and advice where it does not fit.

    Args:
      config: not planned yet; where its length depends on the text, `workdir` may hold that text, prepared.
      budget: bytes it may use; 0: `backend.memory_gb`, or what the machine has.
      timed: take a few steps, unless they could not fit.
      precision: the dtype to compute in, and why; None: as `choose_precision` finds.
    """
    num_windows = _count_windows(config, Path(workdir)) if workdir else 0
    config = config.planned(num_windows) if num_windows else without_data(config)
    budget = budget or memory_budget(config, here)
    dtype, why = precision or choose_precision(here, config.precision)
    trainer = make_trainer(config, here, jnp.dtype(dtype), Untrained.bos_id)
    plan = plan_run(config, trainer, here, budget, why, num_windows)
    possible = not here.memory or plan.peak_bytes < here.memory
    if timed and possible:
        plan = complete(plan, config, trainer)
    if not plan.fits:
        plan = dataclasses.replace(plan, advice=advise(config, here, plan, timed))
    return plan


def memory_budget(config: Config, here: backends.Backend) -> int:
    """Bytes that a run may use: as the config says, or what there is; 0 if unknown."""
    return int(config.backend.memory_gb * 1e9) or here.memory


def _count_windows(config: Config, workdir: Path) -> int:
    tokens, _ = load_tokens(workdir, "train")
    return len(window_starts(tokens, config.model.seq_len, Untrained.bos_id if config.windows == "document" else None))


_UNKNOWN = 1 << 30  # steps of a run that only its text can count


def without_data(config: Config) -> Config:
    """A config that can be compiled before its text is there: a run of unknown length is taken for an endless one."""
    return (config if config.total_steps else dataclasses.replace(config, total_steps=_UNKNOWN)).planned(1)


def measure_memory(config: Config, trainer: Trainer, here: backends.Backend, process: int = 0) -> Memory:
    """What the compiled step of `trainer` holds, by its compiler's own analysis.

    `process`: bytes that the process holds besides, on a CPU; 0: what this one holds now.
    """
    compiled = trainer.compile()
    text, analysis = compiled.as_text(), compiled.memory_analysis()
    machine.release_memory()
    state = trainer.abstract_state
    weights, optimizer, average = _bytes(state.params), _bytes(state.opt_state), _bytes(state.average)
    batch = config.batch_size * (config.model.seq_len + 1) * 4
    between, given = analysis.temp_size_in_bytes, analysis.argument_size_in_bytes
    results = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    logits = min(between, _largest_along(text, config.tokenizer.vocab_size, config.model.embed_dim))
    gradients = min(weights, between - logits)
    cache = jax.eval_shape(lambda: vars(Cache.empty(config.model, config.sample.num_samples, jnp.float32)))
    checkpoint, floor = 0, 0
    peak = given + results + between
    if here.platform == "cpu":
        floor = 0 if process else machine.peak_resident_memory()
        layers = 0 if config.model.scan_layers else config.model.num_layers
        process = process or machine.resident_memory() + PROGRAMS + UNROLLED * layers
        checkpoint = int(CHECKPOINT * bytes_at_once(state))
        program = results + between + int(GAPS * (weights + optimizer + average) + KERNELS * _bfloat16_products(text))
        peak = max(floor, process + len(here.devices) * given + max(len(here.devices) * program, checkpoint))
    return Memory(
        weights=weights,
        optimizer=optimizer,
        average=average,
        batch=batch,
        gradients=gradients,
        logits=logits,
        activations=between - logits - gradients,
        results=results,
        decode_cache=_bytes(cache),
        process=process,
        checkpoint=checkpoint,
        peak=peak,
    )


def time_steps(config: Config, trainer: Trainer, steps: int = STEPS) -> float:
    """Seconds of a training step on random tokens: the median of `steps`, after one that is not counted.

    The mean over the run, where it begins with shorter windows or smaller batches.
    """
    state, mean = trainer.init(), 0.0
    for share, pieces, parts in phases(config.schedule):
        batch = [trainer.place(part) for part in np.split(cut(_random_windows(config), pieces), parts)]
        update = trainer.step if pieces == parts == 1 else trainer.early_step
        seconds = []
        for _ in range(steps + 1):
            begin = time.perf_counter()
            for windows in batch:
                state, metrics = update(state, windows)
                float(metrics["loss"])  # a host read: on some plugins nothing else waits
            seconds.append(time.perf_counter() - begin)
        mean += share * float(np.median(seconds[1:]))
    return mean


def complete(plan: Plan, config: Config, trainer: Trainer) -> Plan:
    """The plan with its time: of the steps, and of scoring along the way (not of samples and checkpoints)."""
    step = time_steps(config, trainer)
    seconds = None
    if plan.total_steps:
        scorer, (params, windows, counted), _ = programs(config, trainer)["score"]
        arguments = _zeros(params), jnp.zeros(windows.shape, windows.dtype), jnp.zeros(counted.shape, counted.dtype)
        float(scorer(*arguments)[0])
        begin = time.perf_counter()
        float(scorer(*arguments)[0])
        every, most = config.evaluate.every_steps, config.evaluate.max_windows
        evaluations = math.ceil(plan.total_steps / every) if every else 1
        scoring = evaluations * math.ceil(most / config.evaluate.batch_size) * (time.perf_counter() - begin)
        seconds = plan.total_steps * step + scoring
    return dataclasses.replace(plan, tokens_per_second=config.tokens_per_step / step, seconds=seconds)


def advise(config: Config, here: backends.Backend, plan: Plan, timed: bool = True) -> tuple[Change, ...]:
    """The three changes that make a run fit into its budget and cost the least speed, found by trying them.

    Prices are shares of the planned speed, or of the fastest change where the run itself could not be timed; without
    `timed` they are 0, and the changes are those that are known to cost little.
    """
    found = []
    for settings in _changes(config):
        changed = change(config, settings)
        dtype = choose_precision(here, changed.precision)[0] if timed else changed.precision
        dtype = plan.precision if dtype == "auto" else dtype
        trainer = make_trainer(changed, here, jnp.dtype(dtype), Untrained.bos_id)
        peak = measure_memory(changed, trainer, here, plan.memory.process).peak
        if peak <= plan.budget_bytes:
            speed = changed.tokens_per_step / time_steps(changed, trainer, 2) if timed else 0.0
            found.append((speed, peak, settings))
            if len(found) == 3:  # those that cost little come first
                break
    found.sort(key=lambda item: -item[0])
    fastest = plan.tokens_per_second or max((speed for speed, *_ in found), default=0.0)
    return tuple(Change(settings, peak, speed, speed / fastest if fastest else 0.0) for speed, peak, settings in found)


def change(config: Config, settings: dict[str, Any]) -> Config:
    """The config with some settings, by dotted name, changed."""
    values: Any = dataclasses.asdict(config)
    for name, value in settings.items():
        *groups, last = name.split(".")
        place = values
        for group in groups:
            place = place[group]
        place[last] = value
    if "micro_batch_size" in settings:
        values["evaluate"]["batch_size"] = settings["micro_batch_size"]
    return Config.build(values)


def _changes(config: Config) -> Iterator[dict[str, Any]]:
    """What differs from the config, of CHANGES; micro-batches are divided by what stands there, as far as they go."""
    now = {"precision": config.precision, "remat": config.remat, "model.scan_layers": config.model.scan_layers}
    seen = []
    for settings in CHANGES:
        new = {name: value for name, value in settings.items() if now.get(name) != value}
        if divide := settings.get("micro_batch_size"):
            micro = max(1, config.micro_batch_size // divide)
            while config.batch_size % micro:
                micro -= 1
            new["micro_batch_size"] = micro
            if micro == config.micro_batch_size:
                del new["micro_batch_size"]
        if new and new not in seen:
            seen.append(new)
            yield new


# ------------------------------------------------------------------------------------------- prediction and measurement


def rehearse(config: Config, platform: str) -> dict[str, Any]:
    """Runs every program of a run in a process of its own; returns what was predicted and what it took.

    Steps, scoring, decoding and two checkpoints. `predicted_bytes` and `predicted_step` come from the plan,
    `measured_bytes` and `measured_step` (the median of twelve) from the run.
    """
    command = [sys.executable, "-m", "tale_jax.plan", platform]
    values = json.dumps(dataclasses.asdict(config))
    done = subprocess.run(command, input=values, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stderr.strip().splitlines() or ["nothing"])[-1].split())[:300]
        return {"error": f"ended with exit code {done.returncode}: {said}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _rehearse_here(config: Config, platform: str) -> dict[str, Any]:
    here = backends.start(platform)
    dtype, why = choose_precision(here, config.precision)
    backends.matmul_peak(dtype)
    trainer = make_trainer(config, here, dtype, Untrained.bos_id)
    plan = plan_run(config, trainer, here, 0, why)
    predicted = time_steps(config, trainer)
    state, windows = trainer.init(), trainer.place(_random_windows(config))
    functions = programs(config, trainer)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        at_once = 0 if here.host_is_free else bytes_at_once(trainer.abstract_state)
        checkpoints = Checkpoints(Path(folder), config.checkpoint.keep, at_once)
        machine.release_memory()
        for step in range(1, 13):
            begin = time.perf_counter()
            state, metrics = trainer.step(state, windows)
            float(metrics["loss"])
            seconds.append(time.perf_counter() - begin)
            if step in (6, 9):
                for name in ("score", "prefill", "decode"):
                    function, args, kwargs = functions[name]
                    jax.block_until_ready(function(*_zeros(args), **kwargs))
                checkpoints.save(step, state, {"examples": step}, None)
                machine.release_memory()
        checkpoints.close()
    return {
        "predicted_bytes": plan.peak_bytes,
        "measured_bytes": machine.peak_resident_memory(),
        "memory": dataclasses.asdict(plan.memory),
        "predicted_step": predicted,
        "measured_step": float(np.median(seconds)),
    }


def variants(config: Config) -> dict[str, Config]:
    """Twelve runs around a config, by name: remat × precision × batch, and a smaller model."""
    small = {"model.embed_dim": config.model.embed_dim // 2, "model.num_heads": config.model.num_heads // 2 or 1}
    small |= {"model.num_kv_heads": 0, "model.mlp_dim": 0}
    found = {}
    for size, shape in (("whole", {}), ("half", small)):
        for remat in ("none", "block"):
            for precision in ("float32", "bfloat16"):
                for batch in (8, 16) if size == "whole" else (16,):
                    settings = {"remat": remat, "precision": precision, "batch_size": batch, "micro_batch_size": batch}
                    settings |= {"model.scan_layers": remat == "block"}
                    found[f"{size}, remat {remat}, {precision}, batch {batch}"] = change(config, shape | settings)
    return found


def _random_windows(config: Config) -> np.ndarray:
    shape = (config.batch_size, config.model.seq_len + 1)
    return np.random.default_rng(0).integers(4, config.tokenizer.vocab_size, shape, dtype=np.int32)


def _zeros(tree: Any) -> Any:
    return jax.tree_util.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree_util.tree_leaves(tree))


def _largest_along(text: str, vocab_size: int, embed_dim: int) -> int:
    """Bytes of the largest array of a compiled program that has an axis of the vocabulary, weights left out."""
    sizes, width = [0], {"f32": 4, "bf16": 2, "f16": 2}
    for kind, dims in set(re.findall(r"\b(f32|bf16|f16)\[([\d,]+)\]", text)):
        shape = [int(size) for size in dims.split(",")]
        if vocab_size in shape and sorted(shape)[-2:] != sorted((vocab_size, embed_dim)):
            sizes.append(math.prod(shape) * width[kind])
    return max(sizes)


def _bfloat16_products(text: str) -> int:
    """Bytes, in float32, of the results of bfloat16 products of more than TERMS terms in a compiled program."""
    shapes = {name: dims.split(",") for name, dims in re.findall(r"([\w.\-]+) = \w+\[([\d,]+)\]", text)}
    dot = r"= bf16\[([\d,]+)\]\S* dot\((?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+),.*?lhs_contracting_dims=\{(\d)\}"
    return sum(
        4 * math.prod(map(int, result.split(",")))
        for result, left, axis in re.findall(dot, text)
        if left in shapes and int(shapes[left][int(axis)]) > TERMS
    )


# ----------------------------------------------------------------------------------------------------------- for people


def parse_bytes(text: str) -> int:
    """8GB, 512MB or 1.5GiB as bytes; "" is 0. Raises ValueError in one line."""
    if not text:
        return 0
    found = re.fullmatch(r"([\d.]+)\s*([kmgt]?)(i?)b?", text.strip().lower())
    try:
        assert found
        return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))
    except (AssertionError, ValueError):
        raise ValueError(f"memory={text} must be a number of bytes; try --memory=8GB") from None


def format_duration(seconds: float) -> str:
    """In the two largest units."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def headline(plan: Plan) -> str:
    """The short plan: one line for memory and one for disk."""
    m = plan.memory
    program = m.weights + m.optimizer + m.average + m.batch + m.gradients + m.logits + m.activations + m.results
    of = f" of {format_bytes(plan.budget_bytes)}" if plan.budget_bytes else ""
    parts = f"the step {format_bytes(program)}" + (f", the process {format_bytes(m.process)}" if m.process else "")
    return (
        f"plan: peak memory {format_bytes(plan.peak_bytes)}{of} ({parts}); "
        f"a checkpoint takes {format_bytes(plan.checkpoint_bytes)} of disk, all of them {format_bytes(plan.disk_bytes)}"
    )


def refusal(plan: Plan, config: Config) -> str:
    """Why a run is not started, and what to do."""
    return (
        f"this run needs {format_bytes(plan.peak_bytes)} of memory and may use {format_bytes(plan.budget_bytes)}; "
        f"{remedies(config)}, or start all the same: --config.backend.ignore_memory=True"
    )


def remedies(config: Config) -> str:
    """What would make a run smaller, without trying it; `advise` tries."""
    flags = []
    if config.remat == "none" or not config.model.scan_layers:
        flags.append("--config.remat=block --config.model.scan_layers=True")
    if config.micro_batch_size > 1:
        flags.append(f"--config.micro_batch_size={max(d for d in _divisors(config) if d < config.micro_batch_size)}")
    tried = "launch/plan.py tells what each change saves and costs"
    return f"try {' or '.join(flags)} ({tried})" if flags else f"make the model smaller ({tried})"


def _divisors(config: Config) -> list[int]:
    return [d for d in range(1, config.batch_size + 1) if config.batch_size % d == 0]


def show_rehearsals(rehearsals: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints what was planned against what it took, a row for each rehearsal."""
    table = rich.table.Table(box=rich.box.SIMPLE, title="Plan against rehearsal", title_justify="left")
    table.add_column("run")
    for title in ("peak, planned", "measured", "off by", "step, planned", "measured", "off by"):
        table.add_column(title, justify="right")
    for name, r in rehearsals.items():
        if "error" in r:
            table.add_row(name, r["error"])
            continue
        off = [r[f"predicted_{what}"] / r[f"measured_{what}"] - 1 for what in ("bytes", "step")]
        table.add_row(
            name,
            format_bytes(r["predicted_bytes"]),
            format_bytes(r["measured_bytes"]),
            f"{off[0]:+.1%}",
            f"{r['predicted_step']:.3f} s",
            f"{r['measured_step']:.3f} s",
            f"{off[1]:+.1%}",
        )
    rich.console.Console(highlight=False).print(table)


def show(plan: Plan) -> None:
    """Prints the plan as tables."""
    console = rich.console.Console(highlight=False)
    table = rich.table.Table(box=rich.box.SIMPLE, show_header=False, title="The run", title_justify="left")
    body = plan.parameters - plan.embedding_parameters
    unknown = "known when the text is prepared (or set total_steps)"
    rows = {
        "machine": f"{plan.platform}: {plan.device}",
        "precision": f"{plan.precision}: {plan.precision_reason}",
        "parameters": f"{plan.parameters:,}: {plan.embedding_parameters:,} in the embedding, {body:,} in the rest",
        "work": f"{plan.flops_per_token / 1e6:,.1f} MFLOP a token, {plan.tokens_per_step:,} tokens a step",
        "length": f"{plan.total_steps:,} steps, {plan.tokens:,} tokens" if plan.total_steps else unknown,
        "passes": f"{plan.passes:.2f} over the text" if plan.passes else unknown,
        "tokens a parameter": f"{plan.tokens_per_parameter:.1f} (about 20 is the classic advice)"
        if plan.tokens_per_parameter
        else unknown,
        "speed": f"{plan.tokens_per_second:,.0f} tokens/s, from a few steps on random tokens"
        if plan.tokens_per_second
        else "not measured",
        "time": format_duration(plan.seconds) + " for steps and scoring"
        if plan.seconds
        else f"{format_duration(1000 * plan.tokens_per_step / plan.tokens_per_second)} for 1,000 steps"
        if plan.tokens_per_second
        else "not measured",
        "disk": f"{format_bytes(plan.checkpoint_bytes)} a checkpoint, {format_bytes(plan.disk_bytes)} in all",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)

    m = plan.memory
    parts = rich.table.Table(box=rich.box.SIMPLE, title="Memory", title_justify="left")
    parts.add_column("part")
    parts.add_column("size", justify="right")
    for name, size in dataclasses.asdict(m).items():
        if size and name not in ("peak", "decode_cache"):
            parts.add_row(name, format_bytes(size))
    parts.add_section()
    parts.add_row("peak", format_bytes(m.peak))
    parts.add_row("cache of decoding, between steps", format_bytes(m.decode_cache))
    console.print(parts)
    if plan.budget_bytes:
        verdict = "It fits" if plan.fits else "It does not fit"
        console.print(f"{verdict}: {format_bytes(plan.peak_bytes)} of {format_bytes(plan.budget_bytes)}.")
    for change in plan.advice:
        flags = " ".join(f"--config.{name}={value}" for name, value in change.settings.items())
        price = f", {change.tokens_per_second:,.0f} tokens/s ({change.speed:.0%} of the speed)" if change.speed else ""
        console.print(f"  {flags}: {format_bytes(change.peak_bytes)}{price}", soft_wrap=True)
    if not plan.fits and not plan.advice:
        console.print("  no change of remat, micro-batch, precision or scan_layers is enough: make the model smaller")


if __name__ == "__main__":
    print(json.dumps(_rehearse_here(without_data(Config.build(json.load(sys.stdin))), sys.argv[1])))
