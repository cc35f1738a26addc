"""Runs what `launch/bench.py` was asked for, and shows it: tables, a plot, or one record for JSON."""

import dataclasses
from pathlib import Path
from typing import Any

import rich.console

from tale_jax.bench.compare import compare, startup, sweep, sweep_variants
from tale_jax.bench.profile import profile
from tale_jax.bench.saving import saving
from tale_jax.bench.throughput import Bench, describe_record, measure, num_streams, tables
from tale_jax.config import Config
from tale_jax.hardware.backend import start_backend
from tale_jax.utils.progress import Progress
from tale_jax.utils.streams import table_console


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """What to measure: the flags of `launch/bench.py`, which explains them; `flags` are passed on by a sweep."""

    kinds: tuple[str, ...]
    seconds: float
    sweeps: tuple[str, ...] = ()
    peer: str = ""
    rounds: int = 3
    profile: bool = False
    startup: bool = False
    saving: bool = False
    flags: tuple[str, ...] = ()

    def __post_init__(self):
        flags = {"sweep": self.sweeps, "peer": self.peer, "profile": self.profile, "startup": self.startup}
        flags |= {"saving": self.saving}
        chosen = sorted(flag for flag, value in flags.items() if value)
        if len(chosen) > 1:
            raise ValueError(f"--{' and --'.join(chosen)} cannot be measured together; give one of them")
        list(sweep_variants(self.sweeps))
        for kind in self.kinds:  # before the first of them is measured
            num_streams(kind)


def bench(config: Config, request: BenchRequest, plot: Path | None = None, quiet: bool = False) -> dict[str, Any]:
    """Measures as requested, prints tables unless `quiet`, draws `plot`, and returns the record for JSON."""
    if plot is not None and (request.peer or request.profile or request.startup or request.saving):
        raise ValueError(f"--plot={plot} shows rates of a config or of a --sweep; leave it out here")
    out = table_console(quiet)
    if request.startup:
        with Progress("starting to train and to sample, each with an empty and with a full cache"):
            measured = startup([flag for flag in request.flags if flag.startswith("--config")])
        return _show(out, measured)
    if request.sweeps:
        tell = rich.console.Console(stderr=True, highlight=False)
        records = sweep(request.flags, request.sweeps, tell.print)
        record: dict[str, Any] = {"sweep": records}
    else:
        subject = Bench(config, start_backend(config.backend.platform))
        if request.peer:
            return _show(out, compare(subject, request.peer, request.rounds, request.seconds, request.kinds))
        if request.profile:
            return _show(out, profile(subject))
        if request.saving:
            with Progress("saving, and its checks"):
                cost = saving(subject)
            return _show(out, cost)
        record = measure(subject, request.kinds, request.seconds).record()
        records = {"": record}
        out.print(describe_record(record))
    for table in tables(records):
        out.print(table)
    if plot is not None:
        from tale_jax.runs.plots import plot_rates

        plot_rates(records, plot)
        out.print(f"The plot is {plot}")
    return record


def _show(out: rich.console.Console, result: Any) -> dict[str, Any]:
    for table in result.tables():
        out.print(table)
    return result.record()
