"""A run from its config to its last checkpoint: what happens before the first step, and between the steps.

The workdir is the run: the same call resumes from the newest checkpoint, with the batches that would have come next.
Several processes that train together (`jax.distributed`) share a workdir: each computes and takes part in checkpoints;
the first one alone writes everything else.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tale_jax.config import PRECISIONS, Config
from tale_jax.data.corpus import SPLITS, open_corpus
from tale_jax.data.loader import Batches
from tale_jax.data.marks import ALL_LEARNED, MARKED, bos_or_marked
from tale_jax.data.packing import PackedWindows, training_windows
from tale_jax.data.prepare import Prepared, base_folder, of_worth, prepare, read_base_file
from tale_jax.data.token_files import check_tokens, load_tokens, seal_tokens, tokens_digest
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.evaluation.scoring import Evaluation, Scorer, Span, first_document_spans, per
from tale_jax.hardware.backend import Backend
from tale_jax.hardware.distributed import (
    any_process,
    check_alike,
    from_main_process,
    is_main_process,
    wait_for_processes,
)
from tale_jax.hardware.joining import tell_error
from tale_jax.hardware.machine import release_memory
from tale_jax.hardware.peak import UNKNOWN_PEAK_NOTE, keep_peak, matmul_peak_of_all
from tale_jax.inference.sampler import Sampler, SampleSettings
from tale_jax.model.transformer import Transformer
from tale_jax.planning.autotune import SHAPE_SETTINGS, autotune
from tale_jax.planning.memory import memory_budget
from tale_jax.planning.numerics import choose_precision
from tale_jax.planning.plan import Plan, check_fits, headline, plan_run, refusal, remedies
from tale_jax.runs.experiment import check_belongs, check_saved_size, check_windows, open_base, run_facts
from tale_jax.runs.records import read_metrics
from tale_jax.runs.resume import resumed_config
from tale_jax.training.checkpoint import Checkpoints, max_concurrent_bytes, read_manifests
from tale_jax.training.loop import Hooks, fit
from tale_jax.training.loss_scale import MIN_SCALE
from tale_jax.training.metrics import Meter, Sinks, check_extras, open_sinks
from tale_jax.training.schedule import scheduled_batches
from tale_jax.training.state import TrainState
from tale_jax.training.step import Trainer, make_trainer
from tale_jax.utils.files import JsonLines
from tale_jax.utils.format import format_bytes
from tale_jax.utils.locks import writer_lock
from tale_jax.utils.paths import quoted
from tale_jax.utils.progress import Progress
from tale_jax.utils.settings import iter_settings, mistake
from tale_jax.utils.signals import StopSignals

MAX_SAMPLE_ROWS = 32  # samples decoded together while training
MAX_SKIPPED = 10  # updates in a row that are left out before the run ends
MIN_TRAIN_WINDOWS = 16  # scored at each evaluation of a run with windows=document; else a quarter of those of valid
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "bad_alloc", "Insufficient Memory")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How `train` ended: at which step, how many the run has, the signal that stopped it (0: none), at which step it
    had started, and the step of the best checkpoint by validation loss."""

    step: int
    total_steps: int
    signal: int
    first_step: int
    best_step: int


def describe(outcome: Outcome, workdir: Path) -> str:
    """Where the model lies that a finished run has made, in lines for people."""
    finished = f"{workdir} has finished its {outcome.total_steps} steps"
    lines = [f"{finished}; the model: {workdir}/checkpoints/{outcome.step}"]
    if outcome.best_step != outcome.step:
        best = f"step {outcome.best_step}: {workdir}/checkpoints/{outcome.best_step}"
        lines.append(f"the best by validation loss, which sample.py and evaluate.py take, is of {best}")
    if outcome.first_step == outcome.step:
        longer = f"--workdir={quoted(workdir)} --config.total_steps={2 * outcome.total_steps}"
        lines.append(f"nothing was left to do; to train longer: python launch/train.py {longer}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Start:
    """What was there when the command was given: `time.monotonic()`, whether the text was prepared, and what is to be
    said first."""

    time: float
    was_prepared: bool
    note: str


def train(
    config: Config, workdir: Path, backend: Backend, overrides: Collection[str] = (), start_time: float = 0.0
) -> Outcome:
    """Prepares what is missing, trains to `total_steps`, and leaves the model, its metrics and samples in `workdir`.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 end it after the current step with a checkpoint; the same call resumes from
    there. A second SIGINT ends the process at once.

    Args:
      config: as `Config.build` makes it.
      workdir: folder of the experiment; it is made when missing.
      backend: from `start_backend`.
      overrides: dotted names of settings that `config.minutes` must not decide.
      start_time: `time.monotonic()` when these minutes began; 0: now.

    Raises:
      ValueError: a setting that cannot work, a run that does not fit into memory, another experiment in the workdir, or
        a loss that is not finite.
      MemoryError: memory ran out all the same; older checkpoints are intact.
      OSError: the workdir cannot be written, or its disk is full; older checkpoints are intact.
    """
    check_extras(config.metrics)
    own = {"workdir": str(workdir), "local_devices": jax.local_device_count()}
    check_alike(own | {name: value for name, value, _ in iter_settings(config)})
    start_time, note = start_time or time.monotonic(), ""
    was_prepared = (workdir / "windows" / f"{SPLITS[-1]}.json").is_file()
    _check_base(config)
    with ExitStack() as held:
        from_main_process(lambda: held.enter_context(writer_lock(workdir, "train", of_worth)))
        if (workdir / "config.json").is_file():
            config, note = resumed_config(config, workdir, overrides)
        elif not was_prepared and (not config.minutes or any(name in overrides for name in SHAPE_SETTINGS)):
            open_corpus(config.corpus, config.seed, workdir)  # a text that is not there is told before anything else
            check_fits(config, backend)
        if config.minutes and not (workdir / "config.json").is_file():
            config = autotune(config, workdir, backend, start_time, overrides)
        return _train(config, workdir, backend, Start(start_time, was_prepared, note))


def _train(config: Config, workdir: Path, backend: Backend, start: Start) -> Outcome:
    wanted = config  # before its length is filled in
    prepared = open_workdir(workdir, config)
    tokenizer, tokens = prepared.tokenizer, prepared.tokens("train")
    _check_prompt(config, tokenizer)
    starts = training_windows(tokens, config, tokenizer.bos_id, tokenizer.pad_id, prepared.chat)
    config = config.with_total_steps(len(starts))
    log = workdir / "log.txt" if is_main_process() else None
    with (
        StopSignals() as signals,
        Progress(
            "train", total=config.total_steps, unit="steps", log=log, show=is_main_process(), clock=signals.clock
        ) as progress,
    ):
        with progress.part("timing matrix products"):
            precision, reason = from_main_process(lambda: _choose_precision(config, workdir, backend))
        for step, saved in read_manifests(folder := workdir / "checkpoints").items():
            check_saved_size(folder / str(step), saved, config)
        as_trained, bos_id = _reading(config, prepared, tokens)
        trainer = make_trainer(as_trained, backend, jnp.dtype(precision), bos_id)
        throttle = max_concurrent_bytes(trainer.abstract_state.replace(base=None), backend.overlap_io)
        facts = run_facts(config, tokenizer, prepared.manifests, precision)
        checkpoints = Checkpoints(workdir, config.checkpoint.keep, throttle, config.checkpoint.keep_every, facts=facts)
        what = f"checkpoint {checkpoints.latest} of {workdir}"
        check_belongs(what, checkpoints.manifest, wanted, tokenizer)
        for manifest in prepared.manifests.values():
            check_windows(what, checkpoints.manifest.get("windows", {}), manifest)
        if (step := checkpoints.latest or 0) >= config.total_steps:
            checkpoints.close()
            return Outcome(step, config.total_steps, 0, step, checkpoints.best or step)
        if start.note:
            progress.print(start.note)
        first_step = step
        from_main_process(lambda: checkpoints.check_space(trainer.abstract_state))
        with progress.part("compiling the training step"):
            compiled = trainer.compile()
            plan = plan_run(config, trainer, compiled, backend, memory_budget(config, backend), reason, len(starts))
        progress.print(headline(plan))
        if any_process(not (config.backend.ignore_memory or plan.fits)):
            checkpoints.close()
            raise ValueError(refusal(plan, config, backend))
        with (
            _batches(config, prepared, tokens, starts, trainer, backend) as batches,
            _errors_after_saving(plan, config, checkpoints),
            _open_sinks(config, workdir) as sinks,
        ):
            changed = from_main_process(lambda: _changed(config, workdir, checkpoints, backend))
            if checkpoints.latest is None:
                with progress.part("drawing initial weights" if not config.base else "reading the base"):
                    state = trainer.init(*_base_params(config, workdir, backend))
            else:
                with progress.part(f"restoring checkpoint {checkpoints.latest}"):
                    state, position = checkpoints.restore(trainer.abstract_state, trainer.state_shardings)
                    if config.lora.rank:
                        saved = checkpoints.manifest.get("base", "")
                        state = state.replace(base=trainer.init(*_base_params(config, workdir, backend, saved)).base)
                if config.corpus.changed == "continue" and not batches.is_in_this_text(position):
                    progress.print("the text has changed: training goes on with the weights, at the start of it")
                else:
                    batches.set_state(position)
            if is_main_process():  # what is refused until here leaves the settings as they were
                config.save(workdir)
            if config.base:
                known = checkpoints.manifest.get("base") or read_base_file(workdir).get("digest", "")
                checkpoints.facts["base"] = known
            release_memory()
            record = _run_record(config, prepared, backend, plan, step)
            record |= {"startup_seconds": time.monotonic() - start.time, "was_prepared": start.was_prepared}
            record |= {"changed": changed} if changed else {}
            sinks.write(record)
            progress.print(_description(config, record, backend, step))
            for name, (before, now) in changed.items():
                progress.print(f"{name} is {json.dumps(now)} from here on, and was {json.dumps(before)}")
            progress.advance(step)
            stop = AgreedStop(signals, trainer)
            hooks = RunHooks(
                config, workdir, tokenizer, trainer, checkpoints, batches, sinks, progress, record, stop, signals.clock
            )
            if config.windows == "document" and isinstance(starts, np.ndarray):
                hooks.score_training_text(tokens, starts)
            if config.base:
                hooks.score_base_text(base_folder(workdir, config.base))
                if step == 0:
                    hooks.on_base(state)
            scheduled = scheduled_batches(hooks.timed(batches), config.schedule, config.total_steps, step)
            state, step = fit(trainer, state, scheduled, hooks, step)
            if step:
                checkpoints.save(step, state, batches.get_state(), None)  # does nothing where this step was saved
            checkpoints.close()
        if stop.number:
            where = f"at step {step} of {config.total_steps}, saved" if step else "before the first step"
            progress.print(f"stopped {where}; the same command goes on from there")
        keep_peak(backend, plan.precision, hooks.peak_flops)
        return Outcome(step, config.total_steps, stop.number, first_step, checkpoints.best or step)


def _check_base(config: Config) -> None:
    """Raises ValueError, in one line, for settings that do not go with a base, or with none."""
    if config.lora.rank and not config.base:
        raise ValueError("base= must name the model whose weights the adapters change; give --config.base=DIR")
    if config.lora.rank and config.optimizer.name != "adamw":
        remedy = "set --config.optimizer.name=adamw"
        raise mistake("optimizer.name", config.optimizer.name, "be adamw with lora.rank above 0", remedy)
    if config.base and config.minutes:
        remedy = "set --config.minutes=0 and --config.total_steps=1000"
        raise mistake("minutes", config.minutes, "be 0 with a base, whose size is known", remedy)


def _base_params(config: Config, workdir: Path, backend: Backend, digest: str = "") -> tuple[Any, ...]:
    """The weights to start from; empty where they are random. `digest`: that of a base that was trained on before."""
    if not config.base:
        return ()
    params = open_base(workdir, config, backend, digest).params
    wait_for_processes()  # by then the main one has written which base it was
    if jax.process_count() > 1:  # arrays of this process alone, which all have alike
        params = jax.device_get(params)
    return (params,)


def _reading(config: Config, prepared: Prepared, tokens: np.ndarray) -> tuple[Config, int]:
    """The config and the id of BOS by which windows are read: no conversation of a window attends to another."""
    bos_id = bos_or_marked(tokens, prepared.tokenizer.bos_id)
    if not prepared.chat:
        return config, bos_id
    model = dataclasses.replace(config.model, mask_documents=True)
    return dataclasses.replace(config, model=model), ALL_LEARNED if config.loss_on == "all" else MARKED


def describe_skipped(metrics: Mapping[str, float]) -> str:
    """Why an update was left out, in a few words."""
    for name in ("loss", "grad_norm"):
        if not np.isfinite(metrics[name]):
            return f"the {name.replace('grad_norm', 'gradient norm')} is {metrics[name]}"
    return f"the loss of {metrics['loss']:.3f} is far above those before"


def _choose_precision(config: Config, workdir: Path, backend: Backend) -> list[str]:
    """The dtype to compute in, and the reason; `auto` is decided once a run, and kept where that can be computed."""
    manifests = read_manifests(workdir / "checkpoints")
    kept = manifests[max(manifests)].get("precision") if manifests and config.precision == "auto" else None
    lost = ""
    if kept in PRECISIONS:
        try:
            return [jnp.dtype(choose_precision(backend, kept)[0]).name, "as this run began"]
        except ValueError as error:
            lost = f"; not {kept}, as this run began ({error})"
    dtype, reason = choose_precision(backend, config.precision)
    return [jnp.dtype(dtype).name, reason + lost]


def _changed(config: Config, workdir: Path, checkpoints: Checkpoints, backend: Backend) -> dict[str, list[Any]]:
    """What is another now than when the run was here before, of its settings and of where it computes: each with its
    old and new value."""
    now = {"num_processes": jax.process_count(), "num_devices": len(backend.devices)}
    before = read_metrics(workdir).get("run", [{}])[-1]
    computes = {name: [old, now[name]] for name in now if (old := before.get(name, now[name])) != now[name]}
    if (workdir / "config.json").is_file():
        return config.changes(Config.load(workdir)) | computes
    settings = checkpoints.manifest.get("settings")  # the file was lost
    return (config.changes(Config.from_json(settings, "the newest checkpoint")) if settings else {}) | computes


def open_workdir(workdir: Path, config: Config) -> Prepared:
    """Makes the folder and prepares the text in it, unless it holds another experiment.

    The main process does it; others wait, and then read what it made.

    Raises ValueError in one line with the first setting that differs, OSError when nothing can be written there.
    """

    def make() -> dict[str, str]:
        _check_workdir(workdir, config)
        prepared = prepare(config, workdir, workdir / "log.txt")
        for split, manifest in prepared.manifests.items():
            if not manifest.sha256:
                prepared.manifests[split] = seal_tokens(workdir, manifest)
            elif split != "test":  # which no training reads
                check_tokens(workdir, manifest)
        return {split: manifest.sha256 for split, manifest in prepared.manifests.items() if split != "test"}

    digests = from_main_process(make)
    prepared = prepare(config, workdir)
    for split, digest in digests.items():  # one process reads the files through, the others take its word
        tokens_digest(workdir / "windows" / f"{split}.bin", digest)
    return prepared


def _check_workdir(workdir: Path, config: Config) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    writable = workdir / ".writable"
    writable.touch()
    writable.unlink()
    if (workdir / "config.json").exists() and (other := config.difference(Config.load(workdir))):
        name, mine, theirs = other
        raise ValueError(
            f"{name}={json.dumps(mine)} must be {json.dumps(theirs)} to go on with the experiment in {workdir}; "
            f"set --config.{name}={quoted(str(theirs))} to resume it, or give another --workdir"
        )


def _check_prompt(config: Config, tokenizer: Tokenizer) -> None:
    """Raises ValueError, in one line, for a prompt that no sample could follow: now, and not at the first sample."""
    count, context = len(tokenizer.encode(config.sample.prompt)) + 1, config.model.seq_len  # with BOS
    if count > context:
        rule = f"be at most {context - 1} tokens, but is {count - 1} (model.seq_len={context}, with BOS before it)"
        remedy = "shorten it, or leave it out to start documents"
        raise mistake("sample.prompt", config.sample.prompt, rule, remedy)


@contextmanager
def _batches(
    config: Config,
    prepared: Prepared,
    tokens: np.ndarray,
    starts: np.ndarray | PackedWindows,
    trainer: Trainer,
    backend: Backend,
) -> Iterator[Batches]:
    """The batches of this process; their threads end with the `with`."""
    block, num_blocks = trainer.block_of_rows(config.batch_size)
    batches = Batches(
        tokens,
        starts,
        seq_len=config.model.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        block=block,
        num_blocks=num_blocks,
        num_threads=2 if backend.overlap_io else 0,
        text=prepared.manifests["train"].corpus.get("contents", ""),
    )
    try:
        yield batches
    finally:
        batches.close()


def _open_sinks(config: Config, workdir: Path) -> Sinks:
    return open_sinks(config.metrics, workdir, dataclasses.asdict(config)) if is_main_process() else Sinks([])


def _run_record(config: Config, prepared: Prepared, backend: Backend, plan: Plan, step: int) -> dict[str, Any]:
    """The record of a run in `metrics.jsonl`, written when it starts or resumes."""
    entropy = prepared.manifests["valid"].entropy
    record = {
        "kind": "run",
        "step": step,
        "time": time.time(),
        "platform": backend.platform,
        "device": backend.device,
        "num_processes": jax.process_count(),
        "num_devices": len(backend.devices),
        "precision": plan.precision,
        "precision_reason": plan.precision_reason,
        "params": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "matmul_peak": matmul_peak_of_all(backend, plan.precision) or None,
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
    if not record["matmul_peak"]:
        lines.append(UNKNOWN_PEAK_NOTE)
    if step:
        lines.append(f"resumes at step {step}")
    return "\n".join(lines)


class AgreedStop:
    """The signal that stops a run; all processes learn of it before the same step, whichever received it.

    A signal travels as metrics do, one step late, so that no process waits for the step that the devices compute.
    """

    def __init__(self, signals: StopSignals, trainer: Trainer):
        mesh = trainer.batch_sharding.mesh
        self._signals, self._agreed, self._on_its_way = signals, 0, None
        self._sharding, self._count = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), mesh.size
        self._max = jax.jit(jnp.max, out_shardings=trainer.replicated)

    @property
    def number(self) -> int:
        """Of the signal; 0: none."""
        if jax.process_count() > 1:
            return self._agreed
        return self._signals.number

    def agree(self) -> bool:
        """Whether to stop before the next step; every process asks before each step."""
        if jax.process_count() > 1 and not self._agreed:
            if self._on_its_way is not None:
                self._agreed = int(self._on_its_way)
            mine = np.array([self._signals.number], np.int32)
            numbers = jax.make_array_from_callback((self._count,), self._sharding, lambda _: mine)
            self._on_its_way = self._max(numbers)
        return self.number > 0


class RunHooks(Hooks):
    """What a run does between its steps: records, validation, checkpoints and samples, in this order."""

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
        stop: AgreedStop,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._config, self._workdir, self._sinks, self._progress = config, workdir, sinks, progress
        self._checkpoints, self._batches, self._stop = checkpoints, batches, stop
        self._meter = Meter(
            tokens_per_step=config.tokens_per_step,
            flops_per_token=record["flops_per_token"],
            peak_flops=record["matmul_peak"] or 0.0,
            tokens=record["step"] * config.tokens_per_step,
            clock=clock,
        )
        examples = int(batches.get_state()["examples"])
        self._first_example = examples - record["step"] * config.batch_size  # of step 1; not 0 after a change of text
        self._last_counted = record["step"]  # step whose update was not left out
        self._owes_save = False  # one was due after a step whose update was left out
        # Decoding is limited by memory bandwidth and by small products: on a CPU float32 is the faster dtype for it.
        decoder = trainer.model.clone(dtype=jnp.float32)
        self._sampler = Sampler(decoder, None, tokenizer, batch_size=min(config.sample.num_samples, MAX_SAMPLE_ROWS))
        self._replicate = jax.jit(lambda tree: tree, out_shardings=trainer.replicated)
        self._tokenizer = tokenizer
        self._model, self._place = trainer.model, trainer.place_same
        self._num_devices, self._replicated = trainer.batch_sharding.mesh.size, trainer.replicated
        bos_id = bos_or_marked(load_tokens(workdir, "valid")[0], tokenizer.bos_id)
        self._scorer = self._scorer_of(trainer.model, bos_id)
        self._evaluation = Evaluation(
            workdir, "valid", self._scorer, tokenizer, config.windows, max_windows=config.evaluate.max_windows
        )
        self._base_evaluation: Evaluation | None = None
        self._train_tokens: np.ndarray | None = None
        self._train_spans: list[Span] = []

    def _scorer_of(self, model: Transformer, bos_id: int) -> Scorer:
        batch_size, tokenizer = self._config.evaluate.batch_size, self._tokenizer
        return Scorer(model, tokenizer, batch_size, self._place, self._num_devices, self._replicated, bos_id)

    @property
    def peak_flops(self) -> float:
        """FLOP/s that the devices were seen to do, at least; 0: unknown."""
        return self._meter.peak_flops

    def score_training_text(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """From now on every evaluation also scores the first document of some training windows.

        The rest of such a window is the opening of the next document, which no model can predict from what stands
        before. Validation has no such tokens, so it compares with this number and not with the training loss.
        """
        count = min(len(starts), max(MIN_TRAIN_WINDOWS, len(self._evaluation.spans) // 4))
        chosen = starts[np.arange(count) * len(starts) // count]
        context = self._config.model.seq_len
        self._train_tokens = tokens
        self._train_spans = list(
            first_document_spans(tokens, chosen, context, bos_or_marked(tokens, self._tokenizer.bos_id))
        )

    def score_base_text(self, base: Path) -> None:
        """Before the first step and after the last, the text of the base is scored too: what was forgotten."""
        if (base / "windows" / "valid.json").is_file():
            theirs, tokenizer = Config.load(base), self._tokenizer
            masked = theirs.model.mask_documents
            model = self._model.clone(config=dataclasses.replace(self._model.config, mask_documents=masked))
            scorer = self._scorer_of(model, bos_or_marked(load_tokens(base, "valid")[0], tokenizer.bos_id))
            maximum = self._config.evaluate.max_windows
            self._base_evaluation = Evaluation(base, "valid", scorer, tokenizer, theirs.windows, max_windows=maximum)

    def on_base(self, state: TrainState) -> None:
        """The model before the first step."""
        self._evaluate(state.eval_params, 0)

    def timed(self, batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The batches; how long the loop waits for them is measured."""
        while True:
            with self._meter.waiting():
                batch = next(batches)
            yield batch

    def should_stop(self) -> bool:
        self._checkpoints.poll()
        return self._stop.agree()

    def is_due(self, step: int) -> bool:
        return self._stop.number > 0 or self._owes_save or any(self._due(step).values())

    def _due(self, step: int) -> dict[str, bool]:
        c, last = self._config, step == self._config.total_steps
        every = {"evaluate": c.evaluate.every_steps, "sample": c.sample.every_steps, "save": c.checkpoint.every_steps}
        return {name: last or (steps > 0 and step % steps == 0) for name, steps in every.items()}

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if metrics["skipped"]:
            self._on_skipped(step, metrics)
        else:
            self._last_counted = step
        self._meter.add(**metrics)
        self._progress.advance()
        if step % self._config.metrics.every_steps == 0 or step == self._config.total_steps:
            record = self._meter.record(step)
            self._sinks.write(record)
            self._progress.set_fields(record)

    def _on_skipped(self, step: int, metrics: dict[str, float]) -> None:
        """Tells of an update that was left out, and ends the run where that does not help."""
        windows = self._batches.window_numbers(self._first_example + (step - 1) * self._config.batch_size)
        numbers = {name: metrics[name] for name in ("loss", "grad_norm")}
        self._sinks.write({"kind": "skipped", "step": step, "time": time.time(), **numbers, "windows": windows})
        reason = describe_skipped(metrics)
        self._progress.print(f"step {step}: {reason}; it does not count (windows {', '.join(map(str, windows))})")
        if metrics.get("loss_scale", MIN_SCALE) > MIN_SCALE and np.isfinite(metrics["loss"]):
            return  # float16 looks for the scale that fits, and halves it each time
        in_a_row = step - self._last_counted
        if in_a_row < MAX_SKIPPED and self._config.on_spike != "stop":
            return
        first_bad = self._last_counted if in_a_row > 1 else step
        kept = self._checkpoints.give_up(max(1, first_bad)) if in_a_row > 1 else self._checkpoints.latest or 0
        where = f"the last good checkpoint is that of step {kept}" if kept else "no checkpoint from before is good"
        raise ValueError(
            f"{reason} at step {step}"
            + (f", the {in_a_row}th update in a row that was left out" * (in_a_row > 1))
            + f": training diverged; {where}. The same command goes on from there with a smaller rate, as "
            f"--config.optimizer.learning_rate={self._config.optimizer.learning_rate / 3:.2g}; or look at the windows "
            f"{', '.join(map(str, windows))}, or try --config.precision=float32 in a new workdir"
        )

    def on_state(self, step: int, state: TrainState) -> None:
        due = self._due(step)
        with self._meter.paused():
            loss = self._evaluate(state.eval_params, step) if due["evaluate"] else None
            last = self._stop.number or step == self._config.total_steps
            self._owes_save |= due["save"]
            if last or (self._owes_save and step == self._last_counted):  # else the weights may have diverged
                with self._progress.part("saving"):
                    self._checkpoints.save(step, state, self._batches.get_state(), loss)
                self._owes_save = False
            if due["sample"] and not self._stop.number:
                with self._progress.part("sampling"):
                    params = self._on_this_process(state.eval_params)
                    if is_main_process():
                        self._sample(params, step)
                    wait_for_processes()
            release_memory()

    def _evaluate(self, params: Any, step: int) -> float | None:
        num_windows = len(self._evaluation.spans) + len(self._train_spans)
        with self._progress.part("evaluate", total=num_windows, unit="windows") as part:
            result = self._evaluation(params, part.advance)
            if self._train_tokens is not None:
                nats, counts, _ = self._scorer(params, self._train_tokens, self._train_spans, part.advance)
                result["train_nats_per_token"] = per(float(nats.sum()), float(counts.sum()))
            if self._base_evaluation and step in (0, self._config.total_steps):
                old = self._base_evaluation(params)
                result |= {f"base_{name}": old[name] for name in ("nats_per_token", "bits_per_byte")}
        keep = ("nats_per_token", "nats_per_token_stderr", "bits_per_byte", "tokens", "windows", "split_windows")
        keep += ("excess_nats_per_token", "train_nats_per_token", "base_nats_per_token", "base_bits_per_byte")
        self._sinks.write(
            {"kind": "valid", "step": step, "time": time.time()} | {k: result[k] for k in keep if k in result}
        )
        excess = f", {result['excess_nats_per_token']:.4f} over the floor" if "excess_nats_per_token" in result else ""
        if (forgotten := result.get("base_nats_per_token")) is not None:
            excess += f"; on the base's own text {forgotten:.4f} nats/token"
        nats, bits = (
            "–" if result[name] is None else format(result[name], form)
            for name, form in (("nats_per_token", ".4f"), ("bits_per_byte", ".3f"))
        )
        part = "" if self._evaluation.whole else f" ({result['windows']} of {result['split_windows']:,} windows)"
        self._progress.print(f"step {step}: validation {nats} nats/token, {bits} bits/byte{excess}{part}")
        return result["nats_per_token"]

    def _on_this_process(self, params: Any) -> Any:
        """The whole weights on one device of this process. All processes call it together."""
        if jax.process_count() == 1:
            return params
        return jax.tree_util.tree_map(lambda x: x.addressable_data(0), self._replicate(params))

    def _sample(self, params: Any, step: int) -> None:
        config, seed = self._config.sample, self._config.seed
        settings = SampleSettings(max_tokens=config.max_tokens, temperature=config.temperature)
        samples = self._sampler.sample(
            config.prompt, settings, num_samples=config.num_samples, seed=seed, params=params
        )
        lines = JsonLines(self._workdir / "samples.jsonl")
        for number, sample in enumerate(samples):
            record = {"step": step, "number": number, "prompt": config.prompt, "text": sample.text}
            lines.append(record | {"temperature": config.temperature, "seed": seed})
        self._progress.print(f"step {step}: {config.prompt}{samples[0].text.strip()}")


@contextmanager
def _errors_after_saving(plan: Plan, config: Config, checkpoints: Checkpoints) -> Iterator[None]:
    """Raises what ends a run early when the current save is finished; running out of memory with advice."""
    try:
        yield
    except BaseException as error:
        tell_error(error)
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
