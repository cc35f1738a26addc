"""What a run tells about itself: its records, where they go, and how they are averaged.

A record is a flat dict with a "kind" (run, train, valid) and a "step". Every record is appended to `metrics.jsonl`, the
one source that reports are made from, and to TensorBoard and Weights & Biases when the config asks for them. Losses are
in nats per token, times in seconds, "time" is Unix time. A number that is not finite is written as null, so that the
file stays JSON for every reader.

    meter = Meter(tokens_per_step=2048)
    with open_sinks(config.metrics, workdir, dataclasses.asdict(config)) as sinks:
        sinks.write({"kind": "run", "step": 0, "time": time.time(), "total_steps": 1000})
        for step in range(1, 1001):
            with meter.waiting():
                batch = next(batches)
            ...
            meter.add(loss=3.2, grad_norm=0.5, learning_rate=1e-3)
            if step % config.metrics.every_steps == 0:
                sinks.write(meter.record(step))

Nothing in here touches a device: the loop hands over host numbers one step late, so dispatch is never blocked.
"""

import contextlib
import importlib
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tale_jax.config import MetricsConfig
from tale_jax.utils.extras import missing_extra
from tale_jax.utils.files import JsonLines

Record = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------- sinks


@runtime_checkable
class Sink(Protocol):
    """Somewhere that records go."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLinesSink(JsonLines):
    """Appends every record to a file (see `utils/files.py`)."""

    def write(self, record: Mapping[str, Any]) -> None:
        self.append(record)

    def close(self) -> None:
        """Nothing to do: no file stays open between records."""


class TensorBoardSink:
    """Writes the numbers of train and valid records as scalars `kind/field`; steps a restart repeats are purged."""

    def __init__(self, logdir: Path):
        self._tensorboard: Any = _import_extra("tensorboardX", "metrics.tensorboard=True", "tensorboard")
        self._logdir = logdir
        self._writer: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        step, kind = record["step"], record["kind"]
        if kind == "run":
            self.close()
        if self._writer is None:
            purge_step = step + 1 if kind == "run" and step else None
            self._writer = self._tensorboard.SummaryWriter(str(self._logdir), purge_step=purge_step)
        for field, value in _numbers(record):
            self._writer.add_scalar(f"{kind}/{field}", value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbSink:
    """Sends records to Weights & Biases under a run id kept in `workdir/wandb_id`, so that a resumed run goes on.

    Never prompts: `mode="online"` without credentials is a ValueError. Offline runs are sent later by `wandb sync`.
    """

    def __init__(self, workdir: Path, *, mode: str, project: str, config: Mapping[str, Any]):
        wandb: Any = _import_extra("wandb", f"metrics.wandb={mode}", "wandb")
        if mode == "online":
            _check_credentials(wandb)
        id_file = workdir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12] + "\n")
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.resolve().name,
                id=id_file.read_text().strip(),
                resume="allow" if mode == "online" else None,  # offline, the same id is joined by `wandb sync`
                mode="online" if mode == "online" else "offline",
                dir=workdir,
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            reason, other = " ".join(str(error).split()), "offline" if mode == "online" else "off"
            raise ValueError(
                f"metrics.wandb={mode} does not start ({reason}); try --config.metrics.wandb={other}"
            ) from error
        self._run.define_metric("*", step_metric="step")  # wandb's own step may not go back, a restarted run's does

    def write(self, record: Mapping[str, Any]) -> None:
        kind = record["kind"]
        if kind == "run":
            self._run.config.update({"run": dict(record)}, allow_val_change=True)
        else:
            self._run.log({"step": record["step"]} | {f"{kind}/{field}": value for field, value in _numbers(record)})

    def close(self) -> None:
        self._run.finish()


class Sinks:
    """Every sink of a run as one; a context manager."""

    def __init__(self, sinks: list[Sink]):
        self._sinks = sinks

    def write(self, record: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_sinks(config: MetricsConfig, workdir: Path, settings: Mapping[str, Any]) -> Sinks:
    """Opens `workdir/metrics.jsonl` and what `config` asks for; `settings` is the whole config, shown by W&B.

    Raises ValueError when an extra is not installed or Weights & Biases lacks credentials, before anything is written.
    """
    optional: list[Sink] = []
    if config.tensorboard:
        optional.append(TensorBoardSink(workdir / "tensorboard"))
    if config.wandb != "off":
        optional.append(WandbSink(workdir, mode=config.wandb, project=config.wandb_project, config=settings))
    return Sinks([JsonLinesSink(workdir / "metrics.jsonl"), *optional])


def check_extras(config: MetricsConfig) -> None:
    """Raises ValueError, in a line, where `open_sinks` would lack an extra or credentials, before anything is done."""
    if config.tensorboard:
        _import_extra("tensorboardX", "metrics.tensorboard=True", "tensorboard")
    if config.wandb != "off":
        wandb = _import_extra("wandb", f"metrics.wandb={config.wandb}", "wandb")
        if config.wandb == "online":
            _check_credentials(wandb)


def _import_extra(module: str, setting: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(missing_extra(setting, module, extra)) from error


def _check_credentials(wandb: Any) -> None:
    if not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "metrics.wandb=online needs credentials and none are set: run `wandb login`, set WANDB_API_KEY, "
            "or set --config.metrics.wandb=offline"
        )


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for field, value in record.items():
        if record["kind"] != "run" and field not in ("kind", "step", "time") and isinstance(value, int | float):
            yield field, float(value)


# ---------------------------------------------------------------------------------------------------------------- meter


class Meter:
    """Averages what happened in the steps since the last record.

    tokens_per_step: tokens trained on in one optimizer step
    flops_per_token: forward and backward, 0 when unknown
    peak_flops: of the devices together, per second, 0 when unknown
    tokens: seen before (a resumed run)

    The first step compiles, so its time and tokens are left out of the rates.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        flops_per_token: float | int = 0,
        peak_flops: float | int = 0,
        tokens: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._tokens_per_step = tokens_per_step
        self._flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self._tokens = tokens
        self._clock = clock
        self._since: float | None = None  # start of the timed interval; None until the first step is done
        self._reset()

    def _reset(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._latest: dict[str, float] = {}
        self._timed_steps = self._skipped = 0
        self._waited = self._paused = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch: counted as `data_wait`."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation, sampling and saving: not counted as training time."""
        start = self._clock()
        yield
        self._paused += self._clock() - start

    def add(
        self, *, loss: float | int, grad_norm: float | int, skipped: float | int = 0, **latest: float | int
    ) -> None:
        """One step is done; takes host floats (loss in nats per token). Of `latest` the last values are recorded.

        A step whose update was `skipped` (1: yes) is counted, and no part of the means.
        """
        self._skipped += int(skipped)
        for field, value in {} if skipped else {"loss": loss, "grad_norm": grad_norm}.items():
            if math.isfinite(value):
                self._values.setdefault(field, []).append(float(value))
        self._latest = {field: float(value) for field, value in latest.items()}
        self._tokens += self._tokens_per_step
        now = self._clock()
        if self._since is None:
            self._since, self._waited, self._paused = now, 0.0, 0.0
        else:
            self._timed_steps += 1
            self._until = now

    def record(self, step: int) -> Record:
        """The train record of the steps since the last one.

        Means of loss and gradient norm, the last learning rate (and loss scale), tokens seen, the number of steps
        `skipped`, and, where known, `tokens_per_second`, `data_wait` (share of time) and `peak_share`.
        """
        record: Record = {"kind": "train", "step": step, "time": time.time(), "tokens": self._tokens}
        record |= {"loss": math.nan}  # of steps that were all skipped
        record |= {field: sum(values) / len(values) for field, values in self._values.items()} | self._latest
        if self._skipped:
            record["skipped"] = self._skipped
        if self._timed_steps and self._since is not None:
            seconds = max(self._until - self._since - self._paused, 1e-9)
            record["tokens_per_second"] = self._timed_steps * self._tokens_per_step / seconds
            record["data_wait"] = min(self._waited / seconds, 1.0)
            if self._flops_per_token and self.peak_flops:
                flops = record["tokens_per_second"] * self._flops_per_token
                self.peak_flops = max(self.peak_flops, flops)  # what was seen to be done can be done
                record["peak_share"] = flops / self.peak_flops
            self._since = self._until
        self._reset()
        return record
