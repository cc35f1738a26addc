"""A run from its config to its last checkpoint: what happens before the first step, and beside the steps.

The workdir is the run: the same call goes on from the newest checkpoint, with the batches that would have come next.
Where several processes train, each computes, and all take part in checkpoints; the first one alone writes the rest.
"""

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices

from tale_jax.config import Config
from tale_jax.data.loader import Batches, window_starts
from tale_jax.data.prepare import Prepared, prepare
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.evaluation.scoring import Evaluation, Scorer
from tale_jax.hardware.backend import Backend, matmul_peak
from tale_jax.hardware.machine import release_memory
from tale_jax.inference.sampler import Sampler, SampleSettings
from tale_jax.planning.autotune import autotune
from tale_jax.planning.memory import memory_budget
from tale_jax.planning.numerics import choose_precision
from tale_jax.planning.plan import Plan, headline, plan_run, refusal, remedies
from tale_jax.runs.experiment import run_identity
from tale_jax.training.checkpoint import Checkpoints, max_concurrent_bytes
from tale_jax.training.loop import Hooks, fit
from tale_jax.training.metrics import Meter, Sinks, open_sinks
from tale_jax.training.schedule import scheduled_batches
from tale_jax.training.state import TrainState
from tale_jax.training.step import Trainer, make_trainer
from tale_jax.utils.files import JsonLines
from tale_jax.utils.format import format_bytes
from tale_jax.utils.progress import Progress

OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "bad_alloc", "Insufficient Memory")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: at which step, how many the run has, and the signal that stopped it (0: none)."""

    step: int
    total_steps: int
    signal: int


def train(
    config: Config, workdir: Path, backend: Backend, overrides: Collection[str] = (), start_time: float = 0.0
) -> Outcome:
    """Prepares what is missing, trains to `total_steps`, and leaves the model, its metrics and samples in `workdir`.

    SIGINT and SIGTERM end it after the step under way with a checkpoint; the same call goes on from there.

    Args:
      overrides: dotted names of settings that `config.minutes` may not decide.
      start_time: `time.monotonic()` when these minutes began; 0: now.

    Raises:
      ValueError: a setting that cannot work, a run that cannot fit into memory, another experiment in the workdir, or a
        loss that is no number.
      MemoryError: memory ran out all the same; the checkpoints before are intact.
      OSError: the disk is full or refuses; the checkpoints before are intact.
    """
    if config.minutes:
        config = autotune(config, workdir, backend, start_time or time.monotonic(), overrides)
    prepared = open_workdir(workdir, config)
    tokenizer, tokens = prepared.tokenizer, prepared.tokens("train")
    starts = window_starts(tokens, config.model.seq_len, tokenizer.bos_id if config.windows == "document" else None)
    config = config.with_total_steps(len(starts))
    log = workdir / "log.txt" if is_main_process() else None
    with Progress("train", total=config.total_steps, unit="steps", log=log, show=is_main_process()) as progress:
        dtype, reason = choose_precision(backend, config.precision)
        trainer = make_trainer(config, backend, dtype, tokenizer.bos_id)
        throttle = max_concurrent_bytes(trainer.abstract_state, backend.overlap_io)
        identity = run_identity(config, tokenizer)
        checkpoints = Checkpoints(workdir, config.checkpoint.keep, throttle, identity)
        if (step := checkpoints.latest or 0) >= config.total_steps:
            checkpoints.close()
            return Outcome(step, config.total_steps, 0)
        compiled = trainer.compile()
        plan = plan_run(config, trainer, compiled, backend, memory_budget(config, backend), reason, len(starts))
        progress.print(headline(plan))
        if not (config.backend.ignore_memory or plan.fits):
            checkpoints.close()
            raise ValueError(refusal(plan, config))
        with (
            _batches(config, tokens, starts, backend) as batches,
            _save_under_way_first(plan, config, checkpoints),
            _open_sinks(config, workdir) as sinks,
            _stop_signals() as stop,
        ):
            if is_main_process():
                config.save(workdir)
            if checkpoints.latest is None:
                state = trainer.init()
            else:
                state, position = checkpoints.restore(trainer.abstract_state, trainer.state_shardings)
                batches.set_state(position)
            release_memory()
            record = _run_record(config, prepared, backend, plan, step)
            sinks.write(record)
            progress.print(_description(config, record, backend, step))
            progress.advance(step)
            hooks = RunHooks(config, workdir, tokenizer, trainer, checkpoints, batches, sinks, progress, record, stop)
            lazily = scheduled_batches(hooks.timed(batches), config.schedule, config.total_steps, step)
            state, step = fit(trainer, state, lazily, hooks, step)
            checkpoints.save(step, state, batches.get_state(), None)  # nothing to do unless a signal came in between
            checkpoints.close()
        if stop:
            progress.print(
                f"stopped at step {step} of {config.total_steps}, saved; the same command goes on from there"
            )
        return Outcome(step, config.total_steps, stop[0] if stop else 0)


def is_main_process() -> bool:
    """Whether this process writes what a run has once: config, metrics, log, samples."""
    return jax.process_index() == 0


def open_workdir(workdir: Path, config: Config) -> Prepared:
    """Makes the folder and prepares the text in it, unless it holds another experiment.

    The first process does it; others wait, and find it done.

    Raises ValueError in one line with the first setting that differs, OSError when nothing can be written there.
    """
    if is_main_process():
        _check_workdir(workdir, config)
        prepare(config, workdir, workdir / "log.txt")
    if jax.process_count() > 1:
        sync_global_devices("prepared")
    return prepare(config, workdir)


def _check_workdir(workdir: Path, config: Config) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / ".writable"
    probe.touch()
    probe.unlink()
    if (workdir / "config.json").exists() and (other := config.difference(Config.load(workdir))):
        name, mine, theirs = other
        raise ValueError(
            f"{name}={json.dumps(mine)} must be {json.dumps(theirs)} to go on with the experiment in {workdir}; "
            f"set --config.{name}={theirs} to resume it, or give another --workdir"
        )


@contextmanager
def _batches(config: Config, tokens: np.ndarray, starts: np.ndarray, backend: Backend) -> Iterator[Batches]:
    """The batches of this process; their threads end with the `with`."""
    batches = Batches(
        tokens,
        starts,
        seq_len=config.model.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=2 if backend.overlap_io else 0,
    )
    try:
        yield batches
    finally:
        batches.close()


def _open_sinks(config: Config, workdir: Path) -> Sinks:
    return open_sinks(config.metrics, workdir, dataclasses.asdict(config)) if is_main_process() else Sinks([])


def _run_record(config: Config, prepared: Prepared, backend: Backend, plan: Plan, step: int) -> dict[str, Any]:
    """What `metrics.jsonl` says of a run as it starts or goes on."""
    entropy = prepared.manifests["valid"].entropy
    record = {
        "kind": "run",
        "step": step,
        "time": time.time(),
        "platform": backend.platform,
        "device": backend.device,
        "num_devices": len(backend.devices),
        "precision": plan.precision,
        "precision_reason": plan.precision_reason,
        "params": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "matmul_peak": matmul_peak(plan.precision) * len(backend.devices),
        "planned_peak_bytes": plan.peak_bytes,
        "tokens_per_step": config.tokens_per_step,
        "total_steps": config.total_steps,
    }
    floor = ("nats_per_token", "nats_per_token_stderr")
    return record | {f"floor_{name}": entropy[name] for name in floor if name in entropy}


def _description(config: Config, record: dict[str, Any], backend: Backend, step: int) -> str:
    lines = [
        f"{record['params']:,} parameters, {config.total_steps:,} steps of {config.tokens_per_step:,} tokens "
        f"({config.num_micro_batches} micro-batch(es) of {config.micro_batch_size} sequences)",
        f"{backend.platform} ({backend.device}), {record['precision']}: {record['precision_reason']}",
    ]
    if backend.note:
        lines.append(backend.note)
    if step:
        lines.append(f"resumes at step {step}")
    return "\n".join(lines)


class RunHooks(Hooks):
    """What a run does beside its steps: records, validation, checkpoints, and samples, in this order."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        tokenizer: Tokenizer,
        trainer: Trainer,
        checkpoints: Checkpoints,
        batches: Batches,
        sinks: Sinks,
        progress: Progress,
        record: dict[str, Any],
        stop: list[int],
    ):
        self._config, self._workdir, self._sinks, self._progress = config, workdir, sinks, progress
        self._checkpoints, self._batches, self._stop = checkpoints, batches, stop
        self._meter = Meter(
            tokens_per_step=config.tokens_per_step,
            flops_per_token=record["flops_per_token"],
            peak_flops=record["matmul_peak"],
            tokens=record["step"] * config.tokens_per_step,
        )
        # One token at a time is bound by memory and by small products: float32 is the faster dtype for it on a CPU.
        decoder = trainer.model.clone(dtype=jnp.float32)
        self._sampler = Sampler(decoder, None, tokenizer, batch_size=config.sample.num_samples)
        scorer = Scorer(
            trainer.model,
            tokenizer,
            config.evaluate.batch_size,
            trainer.place_same,
            trainer.batch_sharding.mesh.size,
            trainer.replicated,
        )
        self._evaluation = Evaluation(
            workdir, "valid", scorer, tokenizer, config.windows, max_windows=config.evaluate.max_windows
        )

    def timed(self, batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The batches; the time that the loop waits for them is measured."""
        while True:
            with self._meter.waiting():
                batch = next(batches)
            yield batch

    def should_stop(self) -> bool:
        return bool(self._stop)

    def is_due(self, step: int) -> bool:
        return bool(self._stop) or any(self._due(step).values())

    def _due(self, step: int) -> dict[str, bool]:
        groups = {"evaluate": self._config.evaluate, "sample": self._config.sample, "save": self._config.checkpoint}
        last = step == self._config.total_steps
        return {name: last or (each.every_steps > 0 and step % each.every_steps == 0) for name, each in groups.items()}

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if not np.isfinite(metrics["loss"]):
            self._checkpoints.wait()
            raise ValueError(
                f"the loss is {metrics['loss']} at step {step}: training diverged; the last checkpoint is intact "
                f"(step {self._checkpoints.latest}). Try a smaller optimizer.learning_rate than "
                f"{self._config.optimizer.learning_rate} in a new workdir, or precision=float32"
            )
        self._meter.add(**metrics)
        self._progress.advance()
        if step % self._config.metrics.every_steps == 0 or step == self._config.total_steps:
            record = self._meter.record(step)
            self._sinks.write(record)
            self._progress.set_fields(record)

    def on_state(self, step: int, state: TrainState) -> None:
        due = self._due(step)
        with self._meter.paused():
            loss = self._evaluate(state.eval_params, step) if due["evaluate"] else None
            if due["save"] or self._stop:
                self._checkpoints.save(step, state, self._batches.get_state(), loss)
            if due["sample"] and is_main_process():
                self._sample(state.eval_params, step)
            release_memory()

    def _evaluate(self, params: Any, step: int) -> float:
        with self._progress.part("evaluate", total=len(self._evaluation.spans), unit="windows") as part:
            result = self._evaluation(params, part.advance)
        keep = ("nats_per_token", "bits_per_byte", "tokens", "excess_nats_per_token")
        self._sinks.write(
            {"kind": "valid", "step": step, "time": time.time()} | {k: result[k] for k in keep if k in result}
        )
        excess = f", {result['excess_nats_per_token']:.4f} over the floor" if "excess_nats_per_token" in result else ""
        self._progress.print(
            f"step {step}: validation {result['nats_per_token']:.4f} nats/token, "
            f"{result['bits_per_byte']:.3f} bits/byte{excess}"
        )
        return result["nats_per_token"]

    def _sample(self, params: Any, step: int) -> None:
        wanted, seed = self._config.sample, self._config.seed
        settings = SampleSettings(max_tokens=wanted.max_tokens, temperature=wanted.temperature)
        samples = self._sampler.sample(
            wanted.prompt, settings, num_samples=wanted.num_samples, seed=seed, params=params
        )
        lines = JsonLines(self._workdir / "samples.jsonl")
        for sample in samples:
            about = {"step": step, "prompt": wanted.prompt, "text": sample.text}
            lines.append(about | {"temperature": wanted.temperature, "seed": seed})
        self._progress.print(f"step {step}: {wanted.prompt}{samples[0].text.strip()}")


@contextmanager
def _save_under_way_first(plan: Plan, config: Config, checkpoints: Checkpoints) -> Iterator[None]:
    """Whatever ends a run early, the save under way is finished first; running out of memory is told with advice."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            checkpoints.wait()
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        latest = checkpoints.latest
        kept = f"the checkpoint of step {latest} is intact" if latest else "no checkpoint was written before"
        raise MemoryError(
            f"memory ran out, though the plan was {format_bytes(plan.peak_bytes)} of "
            f"{format_bytes(plan.budget_bytes)}; {kept}, and the same command goes on from there with less: "
            f"{remedies(config)}"
        ) from error


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that gets the number of a SIGINT or SIGTERM; a second one acts as usual."""
    received: list[int] = []
    before: dict[int, Callable | int | None] = {}

    def note(number: int, _: Any) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
