"""The loop only: batches in, metrics and checkpoints out.

The host never waits for the step it has just dispatched: metrics are read one step late. A run is its workdir: the same
call goes on from the newest checkpoint, with the batches that would have come next.
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

from tale_jax import data
from tale_jax.backend import Backend, matmul_peak
from tale_jax.budget import spend
from tale_jax.checkpoint import Checkpoints, bytes_at_once
from tale_jax.config import Config
from tale_jax.evaluate import Evaluation, Scorer
from tale_jax.machine import format_bytes, release_memory
from tale_jax.memory import memory_budget
from tale_jax.metrics import Meter, open_sinks
from tale_jax.model.transformer import count_parameters, flops_per_token
from tale_jax.plan import Plan, headline, plan_run, refusal, remedies
from tale_jax.probe import choose_precision
from tale_jax.progress import Progress
from tale_jax.sample import Sampler, SampleSettings
from tale_jax.text.prepare import prepare
from tale_jax.training.schedule import batch_parts, window_cut
from tale_jax.training.state import TrainState
from tale_jax.training.step import Trainer, make_trainer

OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "bad_alloc", "Insufficient Memory")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: at which step, how many the run has, and the signal that stopped it (0: none)."""

    step: int
    total_steps: int
    signal: int


def open_workdir(workdir: Path, config: Config) -> None:
    """Makes the folder, unless it holds another experiment.

    Raises ValueError in one line with the first setting that differs, OSError when nothing can be written there.
    """
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


def train(config: Config, workdir: Path, backend: Backend, given: Collection[str] = (), began: float = 0.0) -> Outcome:
    """Prepares what is missing, trains to `total_steps`, and leaves the model, its metrics and samples in `workdir`.

    SIGINT and SIGTERM end it after the step under way with a checkpoint; the same call goes on from there.

    Args:
      given: dotted names of settings that `config.minutes` may not decide.
      began: `time.monotonic()` when these minutes began; 0: now.

    Raises:
      ValueError: a setting that cannot work, a run that cannot fit into memory, another experiment in the workdir, or a
        loss that is no number.
      MemoryError: memory ran out all the same; the checkpoints before are intact.
      OSError: the disk is full or refuses; the checkpoints before are intact.
    """
    if config.minutes:
        config = spend(config, workdir, backend, began or time.monotonic(), given)
    open_workdir(workdir, config)
    log = workdir / "log.txt"
    prepared = prepare(config, workdir, log)
    tokenizer = prepared.tokenizer
    tokens = prepared.tokens("train")
    mark = tokenizer.bos_id if config.windows == "document" else None
    starts = data.window_starts(tokens, config.model.seq_len, mark)
    config = config.planned(len(starts))
    with Progress("train", total=config.total_steps, unit="steps", log=log) as progress:
        dtype, why = choose_precision(backend, config.precision)
        trainer = make_trainer(config, backend, dtype, tokenizer.bos_id)
        batches = data.Batches(
            tokens,
            starts,
            seq_len=config.model.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=2 if backend.host_is_free else 0,
        )
        at_once = bytes_at_once(trainer.abstract_state, backend.host_is_free)
        checkpoints = Checkpoints(workdir, config.checkpoint.keep, at_once)
        if (step := checkpoints.latest or 0) >= config.total_steps:
            checkpoints.close()
            return Outcome(step, config.total_steps, 0)
        peak = matmul_peak(dtype) * len(backend.devices)
        plan = plan_run(config, trainer, backend, memory_budget(config, backend), why, len(starts))
        progress.print(headline(plan))
        if not (config.backend.ignore_memory or plan.fits):
            checkpoints.close()
            raise ValueError(refusal(plan, config))
        with (
            _out_of_memory(plan, config, checkpoints),
            open_sinks(config.metrics, workdir, dataclasses.asdict(config)) as sinks,
            _signals() as stop,
        ):
            config.save(workdir)
            if checkpoints.latest is None:
                state = trainer.init()
            else:
                state, position = checkpoints.restore(trainer.abstract_state, trainer.state_shardings)
                batches.set_state(position)
            release_memory()

            params = count_parameters(state.params)
            flops = flops_per_token(config.model, config.tokenizer.vocab_size)
            entropy = prepared.manifests["valid"].entropy
            run = {
                "kind": "run",
                "step": step,
                "time": time.time(),
                "platform": backend.platform,
                "device": backend.device,
                "num_devices": len(backend.devices),
                "precision": dtype.name,
                "precision_reason": why,
                "params": params,
                "flops_per_token": flops,
                "matmul_peak": peak,
                "planned_peak_bytes": plan.peak_bytes,
                "tokens_per_step": config.tokens_per_step,
                "total_steps": config.total_steps,
            } | {
                f"floor_{name}": entropy[name]
                for name in ("nats_per_token", "nats_per_token_stderr")
                if name in entropy
            }
            sinks.write(run)
            progress.print(_headline(config, run, backend, step))
            meter = Meter(
                tokens_per_step=config.tokens_per_step,
                flops_per_token=flops,
                peak_flops=peak,
                tokens=step * config.tokens_per_step,
            )
            observer = _Observer(config, workdir, tokenizer, trainer, sinks, progress)
            step = _steps(config, trainer, state, step, batches, checkpoints, meter, observer, stop)
            checkpoints.close()
        outcome = Outcome(step, config.total_steps, stop[0] if stop else 0)
        if stop:
            progress.print(
                f"stopped at step {step} of {config.total_steps}, saved; the same command goes on from there"
            )
        return outcome


def _steps(
    config: Config,
    trainer: Trainer,
    state: TrainState,
    step: int,
    batches: data.Batches,
    checkpoints: Checkpoints,
    meter: Meter,
    observer: "_Observer",
    stop: list[int],
) -> int:
    """From `step` to the end, or to a signal; returns the step reached, saved."""
    observer.progress.advance(step)
    pending: dict[str, Any] | None = None

    def settle() -> None:
        """Reads the metrics of the step before, which by now is done or nearly so."""
        nonlocal pending
        if pending is None:
            return
        at, updates = pending["step"], pending["updates"]
        values = {name: float(np.mean([float(update[name]) for update in updates])) for name in updates[0]}
        pending = None
        if not np.isfinite(values["loss"]):
            checkpoints.wait()
            raise ValueError(
                f"the loss is {values['loss']} at step {at}: training diverged; the last checkpoint is intact "
                f"(step {checkpoints.latest}). Try a smaller optimizer.learning_rate than "
                f"{config.optimizer.learning_rate} in a new workdir, or precision=float32"
            )
        meter.add(**values)
        observer.progress.advance()
        if at % config.metrics.every_steps == 0 or at == config.total_steps:
            observer.record(meter.record(at))

    while step < config.total_steps and not stop:
        with meter.waiting():
            pieces = window_cut(config.schedule, config.total_steps, step)
            parts = batch_parts(config.schedule, config.total_steps, step)
            batch = [trainer.place(part) for part in np.split(data.cut(next(batches), pieces), parts)]
        update, updates = trainer.step if pieces == parts == 1 else trainer.early_step, []
        for windows in batch:
            state, metrics = update(state, windows)
            updates.append(metrics)
        settle()
        step += 1
        pending = {"step": step, "updates": updates}

        last = step == config.total_steps
        due = {
            name: last or _due(step, getattr(config, name).every_steps) for name in ("evaluate", "sample", "checkpoint")
        }
        if any(due.values()) or stop:
            settle()
            with meter.paused():
                loss = observer.evaluate(state.served, step) if due["evaluate"] else None
                if due["sample"]:
                    observer.sample(state.served, step)
                if due["checkpoint"] or stop:
                    checkpoints.save(step, state, batches.get_state(), loss)
                release_memory()
    settle()
    checkpoints.save(step, state, batches.get_state(), None)  # nothing to do unless the signal came in between
    return step


class _Observer:
    """What a run shows of itself: records, validation and samples along the way."""

    def __init__(self, config, workdir, tokenizer, trainer, sinks, progress):
        self.progress = progress
        self._config, self._workdir, self._sinks, self._tokenizer = config, workdir, sinks, tokenizer
        # One token at a time is bound by memory and by small products: float32 is the faster dtype for it on a CPU.
        decoder = trainer.model.clone(dtype=jnp.float32)
        self._sampler = Sampler(decoder, None, tokenizer, batch_size=config.sample.num_samples)
        scorer = Scorer(trainer.model, tokenizer, config.evaluate.batch_size, trainer.place)
        self._evaluation = Evaluation(
            workdir, "valid", scorer, tokenizer, config.windows, max_windows=config.evaluate.max_windows
        )

    def record(self, record: dict[str, Any]) -> None:
        self._sinks.write(record)
        self.progress.show(record)

    def evaluate(self, params: Any, step: int) -> float:
        with self.progress.part("evaluate", total=len(self._evaluation.spans), unit="windows") as part:
            result = self._evaluation(params, part.advance)
        keep = ("nats_per_token", "bits_per_byte", "tokens", "excess_nats_per_token")
        self._sinks.write(
            {"kind": "valid", "step": step, "time": time.time()} | {k: result[k] for k in keep if k in result}
        )
        excess = f", {result['excess_nats_per_token']:.4f} over the floor" if "excess_nats_per_token" in result else ""
        self.progress.print(
            f"step {step}: validation {result['nats_per_token']:.4f} nats/token, "
            f"{result['bits_per_byte']:.3f} bits/byte{excess}"
        )
        return result["nats_per_token"]

    def sample(self, params: Any, step: int) -> None:
        wanted = self._config.sample
        settings = SampleSettings(max_tokens=wanted.max_tokens, temperature=wanted.temperature)
        samples = self._sampler.sample(
            wanted.prompt, settings, num_samples=wanted.num_samples, seed=self._config.seed, params=params
        )
        with (self._workdir / "samples.jsonl").open("a", encoding="utf-8") as file:
            for sample in samples:
                line = {"step": step, "prompt": wanted.prompt, "text": sample.text}
                file.write(json.dumps(line | {"temperature": wanted.temperature, "seed": self._config.seed}) + "\n")
        self.progress.print(f"step {step}: {wanted.prompt}{samples[0].text.strip()}")


def _headline(config: Config, run: dict[str, Any], backend: Backend, step: int) -> str:
    lines = [
        f"{run['params']:,} parameters, {config.total_steps:,} steps of {config.tokens_per_step:,} tokens "
        f"({config.num_micro_batches} micro-batch(es) of {config.micro_batch_size} sequences)",
        f"{backend.platform} ({backend.device}), {run['precision']}: {run['precision_reason']}",
    ]
    if backend.note:
        lines.append(backend.note)
    if step:
        lines.append(f"resumes at step {step}")
    return "\n".join(lines)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _out_of_memory(plan: Plan, config: Config, checkpoints: Checkpoints) -> Iterator[None]:
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
def _signals() -> Iterator[list[int]]:
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
