"""Does a run fit, how long will it take, and what would make it fit? Answered before any data or step.

Memory comes from the compiler (`memory.py`), time from a few real steps on random tokens.

    python launch/plan.py --config=configs/m2_air.py --memory=8GB
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
import rich.table

from tale_jax.config import Config, change, leaves
from tale_jax.data.packing import training_windows
from tale_jax.data.token_files import load_tokens
from tale_jax.hardware.backend import Backend, for_mac
from tale_jax.model.transformer import count_parameters, flops_per_token
from tale_jax.planning.memory import (
    Memory,
    least_memory,
    measure_memory,
    memory_budget,
    rough_activations,
    tree_bytes,
)
from tale_jax.planning.numerics import choose_precision
from tale_jax.planning.programs import UntrainedTokenizer, programs
from tale_jax.planning.timing import time_steps
from tale_jax.training.step import Trainer, make_trainer
from tale_jax.utils.format import format_bytes, format_duration
from tale_jax.utils.progress import Progress
from tale_jax.utils.streams import table_console

MAX_ADVICE = 3
MIN_SHOWN_BYTES = 100_000  # of a part of the memory
SAFE_SHARE = 0.5  # of the budget: what is guessed to take less is not compiled to see whether it fits
# What may make a run fit, the changes that cost little first. `micro_batch_size` is a divisor here.
CANDIDATE_CHANGES: tuple[dict[str, Any], ...] = (
    {"model.scan_layers": True},
    {"precision": "bfloat16"},
    {"micro_batch_size": 2},
    {"remat": "dots_with_no_batch_dims_saveable"},
    {"remat": "block"},
    {"remat": "block", "model.scan_layers": True},
    {"micro_batch_size": 4},
    {"micro_batch_size": 2, "remat": "block", "model.scan_layers": True},
    {"micro_batch_size": 8, "remat": "block", "model.scan_layers": True},
    {"micro_batch_size": 1 << 30, "remat": "block", "model.scan_layers": True},
)
ALL_TRIED = "no change of remat, micro-batch, precision or scan_layers is enough"
PART_NAMES = {"scratch": "scratch of the compiled program", "checkpoint": "checkpoint, while it is written"}


@dataclasses.dataclass(frozen=True)
class FittingChange:
    """Settings that make a run fit, and their cost: `speed` is the share of tokens per second that is left."""

    settings: dict[str, Any]
    peak_bytes: int
    tokens_per_second: float
    speed: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will take.

    Rates are 0, and `advice` is empty, where nothing was measured; None is what only the prepared text can tell.
    """

    platform: str
    device: str
    precision: str
    precision_reason: str
    parameters: int
    trained_parameters: int
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
    advice: tuple[FittingChange, ...] = ()


def plan_run(
    config: Config,
    trainer: Trainer,
    compiled: Any,
    backend: Backend,
    budget: int,
    reason: str,
    num_windows: int = 0,
) -> Plan:
    """The plan of a config, without its time.

    Args:
      compiled: of `trainer.compile()`.
      budget: bytes it may use; 0 if unknown.
      reason: of the dtype.
      num_windows: in the training text; 0 if unknown.
    """
    memory = measure_memory(config, trainer, compiled, backend)
    state = trainer.abstract_state
    state_bytes, params = tree_bytes(state.replace(base=None)), state.base.base if state.base else state.params
    count, embedding = count_parameters(params), params["embedding"].size
    known = bool(num_windows) or config.length_known
    tokens = config.total_steps * config.tokens_per_step if known else None
    return Plan(
        platform=backend.platform,
        device=backend.device,
        precision=jnp.dtype(trainer.model.dtype).name,
        precision_reason=reason,
        parameters=count,
        trained_parameters=count_parameters(state.params),
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
        checkpoint_bytes=state_bytes,
        disk_bytes=state_bytes * (_checkpoints_kept(config) + 2),  # the best one, and one that is being written
    )


def check_fits(config: Config, backend: Backend) -> None:
    """Refuses, before its text is read, a run that cannot fit into memory.

    What a run holds at least is known at once. The step is compiled only where a guess says that it may not fit: a run
    that does not and gets through is refused when its text is prepared.

    Raises:
      ValueError: one line with what makes the run fit.
    """
    budget = memory_budget(config, backend)
    if not budget or config.backend.ignore_memory:
        return
    config = config.with_total_steps()
    trainer = make_trainer(config, backend, jnp.dtype("float32"), UntrainedTokenizer.bos_id)
    least = least_memory(config, trainer, backend)
    if least > budget:
        raise ValueError(_refusal(f"at least {format_bytes(least)}", budget, ()))
    if least + rough_activations(config) < SAFE_SHARE * budget:
        return
    with Progress("does it fit", total=1, unit="stages") as progress, progress.stage("compiling the training step"):
        dtype, reason = choose_precision(backend, config.precision)
        trainer = make_trainer(config, backend, dtype, UntrainedTokenizer.bos_id)
        plan = plan_run(config, trainer, trainer.compile(), backend, budget, reason)
    if not plan.fits:
        raise ValueError(refusal(plan, config, backend))


def _checkpoints_kept(config: Config) -> int:
    """The newest, and those of multiples of `keep_every` steps."""
    c = config.checkpoint
    more = config.total_steps // math.lcm(c.keep_every, c.every_steps) if c.keep_every and c.every_steps else 0
    return c.keep + more


def make_mac_plan(config: Config, backend: Backend, workdir: Path | None = None, memory: int = 0) -> Plan:
    """`make_plan` for the GPU of a Mac with `memory` bytes (0: 8 GB), on any machine.

    The step that a Metal plugin would get is compiled here instead: it needs the same memory, except that each compiler
    reuses memory in its own way. Nothing is timed. The dtype is float32 unless the config names another, since only the
    Mac can tell which dtypes are correct and fast on it.
    """
    mac = for_mac(backend, memory or 8 * 10**9)
    dtype = "float32" if config.precision == "auto" else config.precision
    reason = "the Mac will choose" if config.precision == "auto" else "as the config says"
    return make_plan(config, mac, workdir, timed=False, precision=(dtype, reason))


def make_plan(
    config: Config,
    backend: Backend,
    workdir: Path | None = None,
    budget: int = 0,
    timed: bool = True,
    precision: tuple[Any, str] | None = None,
) -> Plan:
    """The whole plan of a config, as launch/plan.py shows it: with its time, and advice where it does not fit.

    Args:
      config: of the run.
      workdir: where its text is prepared, which tells the length of a pass; None: nowhere.
      budget: bytes it may use; 0: `backend.memory_gb`, or what the machine has.
      timed: take a few steps, unless they could not fit.
      precision: the dtype to compute in, and the reason; None: those of `choose_precision`.
    """
    num_windows = count_windows(config, workdir) if workdir else 0
    config = config.with_total_steps(num_windows)
    budget = budget or memory_budget(config, backend)
    with Progress("plan", total=3, unit="stages") as progress:
        with progress.stage("timing matrix products"):
            dtype, reason = precision or choose_precision(backend, config.precision)
        trainer = make_trainer(config, backend, jnp.dtype(dtype), UntrainedTokenizer.bos_id)
        with progress.stage("compiling the training step"):
            plan = plan_run(config, trainer, trainer.compile(), backend, budget, reason, num_windows)
        possible = not backend.memory or plan.peak_bytes < backend.memory
        with progress.stage("timing a few steps"):
            plan = with_time(plan, config, trainer) if timed and possible else plan
    if not plan.fits:
        plan = dataclasses.replace(plan, advice=find_advice(config, backend, plan, timed))
    return plan


def count_windows(config: Config, workdir: Path) -> int:
    """Windows in the training text that is prepared in `workdir`."""
    tokens, manifest = load_tokens(workdir, "train")
    t = UntrainedTokenizer
    return len(training_windows(tokens, config, t.bos_id, t.pad_id, bool(manifest.chat)))


def with_time(plan: Plan, config: Config, trainer: Trainer) -> Plan:
    """The plan with its time: of the steps, and of validation between them (not of samples and checkpoints)."""
    step = time_steps(config, trainer)
    seconds = None
    if plan.total_steps:
        score = programs(config, trainer)["score"]
        args = zeros(score.args)
        float(score.function(*args)[0])
        start_time = time.perf_counter()
        float(score.function(*args)[0])
        batch_seconds = time.perf_counter() - start_time
        every, max_windows = config.evaluate.every_steps, config.evaluate.max_windows
        num_evaluations = math.ceil(plan.total_steps / every) if every else 1
        num_batches = num_evaluations * math.ceil(max_windows / config.evaluate.batch_size)
        seconds = plan.total_steps * step + num_batches * batch_seconds
    return dataclasses.replace(plan, tokens_per_second=config.tokens_per_step / step, seconds=seconds)


def find_advice(
    config: Config, backend: Backend, plan: Plan, timed: bool = True, enough: int = MAX_ADVICE
) -> tuple[FittingChange, ...]:
    """The changes that make a run fit into its budget, found by trying them: `enough` at most, in the order of
    CANDIDATE_CHANGES, which is that of their cost, whatever else the machine does meanwhile.

    Nothing is tried where the state alone is too large. `speed` is the share of the planned speed, or of the fastest
    change where the run itself could not be timed; 0 without `timed`.
    """
    memory = plan.memory
    state = memory.weights + memory.optimizer + memory.ema + memory.gradients + memory.process
    candidates = list(_candidate_changes(config)) if state <= plan.budget_bytes else []
    is_here = timed or backend.platform == "cpu" or backend.devices[0].platform != "cpu"  # so its dtypes can be checked
    found: list[tuple[float, int, dict[str, Any]]] = []
    with Progress("what would fit", total=len(candidates), unit="changes") as progress:
        for settings in candidates:
            with progress.stage("trying " + ", ".join(f"{name}={value}" for name, value in settings.items())):
                changed = change(config, settings)
                try:
                    dtype = choose_precision(backend, changed.precision)[0] if is_here else changed.precision
                except ValueError:  # not correct here
                    continue
                dtype = plan.precision if dtype == "auto" else dtype
                trainer = make_trainer(changed, backend, jnp.dtype(dtype), UntrainedTokenizer.bos_id)
                peak = measure_memory(changed, trainer, trainer.compile(), backend, plan.memory.process).peak
                if peak <= plan.budget_bytes:
                    speed = changed.tokens_per_step / time_steps(changed, trainer, num_steps=2) if timed else 0.0
                    found.append((speed, peak, settings))
            if len(found) == enough:
                break
    fastest = plan.tokens_per_second or max((speed for speed, *_ in found), default=0.0)
    return tuple(
        FittingChange(settings, peak, speed, speed / fastest if fastest else 0.0) for speed, peak, settings in found
    )


def _candidate_changes(config: Config) -> Iterator[dict[str, Any]]:
    """CANDIDATE_CHANGES for this config: with sizes of micro-batches, and only settings that differ from its own."""
    current = dict(leaves(config))
    seen = []
    for candidate in CANDIDATE_CHANGES:
        settings = dict(candidate)
        if divisor := settings.get("micro_batch_size"):
            settings["micro_batch_size"] = _largest_divisor(config.batch_size, config.micro_batch_size // divisor)
        settings = {name: value for name, value in settings.items() if current[name] != value}
        if settings and settings not in seen:
            seen.append(settings)
            yield settings


def _largest_divisor(number: int, bound: int) -> int:
    """The largest divisor of `number` up to `bound`; 1 if there is no other."""
    return next((divisor for divisor in range(bound, 1, -1) if number % divisor == 0), 1)


def zeros(tree: Any) -> Any:
    """Arrays of zeros of the shapes in a tree, such as the arguments of `programs`."""
    return jax.tree_util.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


# ---------------------------------------------------------------------------------------------------------------- text


def headline(plan: Plan) -> str:
    """Memory and disk of a plan, in one line."""
    budget = f" of {format_bytes(plan.budget_bytes)}" if plan.budget_bytes else ""
    process = f", the process {format_bytes(plan.memory.process)}" if plan.memory.process else ""
    parts = f"the step {format_bytes(plan.memory.step)}{process}"
    return (
        f"plan: peak memory {format_bytes(plan.peak_bytes)}{budget} ({parts}); "
        f"a checkpoint takes {format_bytes(plan.checkpoint_bytes)} of disk, all of them {format_bytes(plan.disk_bytes)}"
    )


def refusal(plan: Plan, config: Config, backend: Backend) -> str:
    """Why a run is not started, and a change that was tried and makes it fit, in one line."""
    advice = find_advice(config, backend, plan, timed=False, enough=1)
    return _refusal(format_bytes(plan.peak_bytes), plan.budget_bytes, advice)


def _refusal(needed: str, budget: int, advice: tuple[FittingChange, ...]) -> str:
    changes = " or ".join(f"{_flags(each)} (then {format_bytes(each.peak_bytes)})" for each in advice)
    remedy = f"try {changes}" if advice else f"{ALL_TRIED}: {_smaller_model()}"
    return (
        f"this run needs {needed} of memory and may use {format_bytes(budget)}; {remedy}, or start all the same: "
        "--config.backend.ignore_memory=True"
    )


def _flags(advice: FittingChange) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in advice.settings.items())


def remedies(config: Config) -> str:
    """Flags that make a run smaller, for one that its plan said would fit; unlike `find_advice`, nothing is tried."""
    flags = []
    if config.remat == "none" or not config.model.scan_layers:
        flags.append("--config.remat=block --config.model.scan_layers=True")
    if config.micro_batch_size > 1:
        smaller = _largest_divisor(config.batch_size, config.micro_batch_size - 1)
        flags.append(f"--config.micro_batch_size={smaller}")
    more = "launch/plan.py tells what each change saves and costs"
    return f"try {' or '.join(flags)} ({more})" if flags else f"{_smaller_model()} ({more})"


def _smaller_model() -> str:
    return "make the model smaller: lower model.embed_dim, model.num_layers, model.seq_len or tokenizer.vocab_size"


def print_plan(plan: Plan) -> None:
    """Prints the plan as tables."""
    console = table_console()
    table = rich.table.Table(box=rich.box.SIMPLE, show_header=False, title="The run", title_justify="left")
    body = plan.parameters - plan.embedding_parameters
    unknown = "known when the text is prepared (or set total_steps)"
    rows = {
        "machine": f"{plan.platform}: {plan.device}",
        "precision": f"{plan.precision}: {plan.precision_reason}",
        "parameters": f"{plan.parameters:,}: {plan.embedding_parameters:,} in the embedding, {body:,} in the rest",
        "trained": f"{plan.trained_parameters:,}, of adapters"
        if plan.trained_parameters != plan.parameters
        else "all of them",
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

    memory = plan.memory
    parts = rich.table.Table(box=rich.box.SIMPLE, title="Memory", title_justify="left")
    parts.add_column("part")
    parts.add_column("size", justify="right")
    held = memory.parts_at_peak()
    for name, size in held.items():
        if size >= MIN_SHOWN_BYTES:
            parts.add_row(PART_NAMES.get(name, name), format_bytes(size))
    parts.add_section()
    parts.add_row("peak", format_bytes(memory.peak))
    if "checkpoint" in held:
        parts.add_row("in place of the checkpoint, in a step", format_bytes(memory.step_only))
    elif memory.checkpoint:
        parts.add_row("checkpoint, between steps", format_bytes(memory.checkpoint))
    parts.add_row("cache of decoding, between steps", format_bytes(memory.decode_cache))
    console.print(parts)
    if plan.budget_bytes:
        verdict = "It fits" if plan.fits else "It does not fit"
        console.print(f"{verdict}: {format_bytes(plan.peak_bytes)} of {format_bytes(plan.budget_bytes)}.")
    for advice in plan.advice:
        flags = _flags(advice)
        price = f", {advice.tokens_per_second:,.0f} tokens/s ({advice.speed:.0%} of the speed)" if advice.speed else ""
        console.print(f"  {flags}: {format_bytes(advice.peak_bytes)}{price}", soft_wrap=True)
    if not plan.fits and not plan.advice:
        console.print(f"  {ALL_TRIED}: {_smaller_model()}", soft_wrap=True)
