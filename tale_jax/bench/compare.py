"""Benchmarks that run other programs: sweeps, comparisons with a peer, and the time it takes to start.

A sweep measures each variant in a process of its own, so that its peak memory is its own. A peer is any program that
prints JSON objects, one a line, with `kind` (train, decode, …), `mode` and `tokens_per_s`. It is run in turns with our
benchmark, since one machine is not equally fast at all times: what counts is the ratio within a round.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tale_jax.bench.throughput import Bench
from tale_jax.utils.subprocesses import run

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
START_TIMEOUT = 600.0  # seconds until a script must have started


def run_json_lines(command: Sequence[str]) -> list[dict[str, Any]]:
    """Runs a command and returns the JSON objects among the lines of its stdout. Raises ValueError when it fails."""
    result = run(command)
    objects = []
    for line in result.stdout.splitlines():
        with contextlib.suppress(ValueError):
            objects.append(json.loads(line))
    objects = [record for record in objects if isinstance(record, dict)]
    if result.reason or not objects:
        reason = result.reason or "no JSON object on stdout"
        raise ValueError(f"{shlex.join(command)} ended with {reason}; run it by itself to see what it says")
    return objects


# ---------------------------------------------------------------------------------------------------------------- sweep


def sweep_variants(sweeps: Sequence[str]) -> Iterator[dict[str, str]]:
    """Every combination of values of `name=value,value,...`. Raises ValueError for a sweep of another form."""
    axes = []
    for sweep in sweeps:
        name, _, values = sweep.partition("=")
        if not name or not all(values.split(",")):
            raise ValueError(f"--sweep={sweep} must be NAME=VALUE,VALUE; try --sweep=model.embed_dim=192,384,768")
        axes.append([(name.removeprefix("config."), value) for value in values.split(",")])
    return (dict(choice) for choice in itertools.product(*axes))


def sweep(flags: Sequence[str], sweeps: Sequence[str], on_variant: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """The record of each variant, by its name.

    Args:
      flags: of every run of `bench.py`.
      sweeps: see `sweep_variants`.
      on_variant: called with the name of each variant before it runs.
    """
    records = {}
    for variant in sweep_variants(sweeps):
        name = " ".join(f"{field}={value}" for field, value in variant.items())
        on_variant(name)
        changed = [f"--config.{field}={value}" for field, value in variant.items()]
        [*_, records[name]] = run_json_lines([sys.executable, str(LAUNCH / "bench.py"), *flags, *changed, "--json"])
    return records


# ----------------------------------------------------------------------------------------------------------------- peer


@dataclasses.dataclass(frozen=True)
class Round:
    """One turn of each: our tokens per second, and the peer's by mode."""

    kind: str
    ours: float
    theirs: dict[str, float]

    @property
    def ratio(self) -> float:
        """Ours against the peer's best mode."""
        return self.ours / max(self.theirs.values())


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All rounds with the peer of `command`."""

    command: str
    rounds: tuple[Round, ...]

    def ratios(self) -> dict[str, list[float]]:
        """The ratio of every round, by kind."""
        kinds = dict.fromkeys(turn.kind for turn in self.rounds)
        return {kind: [turn.ratio for turn in self.rounds if turn.kind == kind] for kind in kinds}

    def record(self) -> dict[str, Any]:
        medians = {
            kind: {"median_ratio": statistics.median(ratios), "ratios": ratios}
            for kind, ratios in self.ratios().items()
        }
        return {"peer": self.command, **medians, "rounds": [dataclasses.asdict(turn) for turn in self.rounds]}

    def tables(self) -> list[Table]:
        table = Table("round", "", "ours", "theirs, tokens/s", "ratio to their best", box=None, header_style="bold")
        for kind, ratios in self.ratios().items():
            for number, turn in enumerate([turn for turn in self.rounds if turn.kind == kind], start=1):
                theirs = ", ".join(f"{mode} {rate:,.1f}" for mode, rate in turn.theirs.items())
                table.add_row(str(number), kind, f"{turn.ours:,.1f}", theirs, f"{turn.ratio:.2f}")
            table.add_row("median", kind, "", "", f"{statistics.median(ratios):.2f}", style="bold")
        return [table]


def compare(bench: Bench, command: str, rounds: int, seconds: float, kinds: Sequence[str]) -> Comparison:
    """Ours, peer, ours, peer, …: the rates of those `kinds` that the peer prints. Raises ValueError for none."""
    turns = []
    for _ in range(rounds):
        ours = {kind: bench.rate(kind, seconds).tokens_per_second for kind in kinds}
        theirs: dict[str, dict[str, float]] = {}
        for record in run_json_lines(shlex.split(os.path.expanduser(command))):
            if {"kind", "mode", "tokens_per_s"} <= record.keys():
                theirs.setdefault(record["kind"], {})[record["mode"]] = _peer_rate(record["tokens_per_s"], command)
        if not (common := [kind for kind in kinds if kind in theirs]):
            remedy = f"try --only={','.join(theirs)}" if theirs else "let it print kind, mode and tokens_per_s"
            rule = f"print a kind of {', '.join(kinds)}, but printed {', '.join(theirs) or 'none'}"
            raise ValueError(f"--peer={command} must {rule}; {remedy}")
        turns += [Round(kind, ours[kind], theirs[kind]) for kind in common]
    return Comparison(command, tuple(turns))


def _peer_rate(value: Any, command: str) -> float:
    rate = float(value) if isinstance(value, int | float) else math.nan
    if not 0 < rate < math.inf:
        raise ValueError(
            f"--peer={command} must print a tokens_per_s above 0, but printed {value}; "
            "run it by itself to see what it says"
        )
    return rate


# -------------------------------------------------------------------------------------------------------------- startup


@dataclasses.dataclass(frozen=True)
class Startup:
    """Seconds from the command to the first finished step of training, and to the first sampled text.

    Attributes:
      train, sample: with an empty cache of compiled programs ("cold"), and with the cache of the first start ("warm").
    """

    train: dict[str, float]
    sample: dict[str, float]

    def record(self) -> dict[str, Any]:
        return {"startup": dataclasses.asdict(self)}

    def tables(self) -> list[Table]:
        table = Table("seconds from the command to", "cold", "warm", box=None, header_style="bold")
        for name, times in (("the first finished step", self.train), ("the first sampled text", self.sample)):
            table.add_row(name, f"{times['cold']:.1f}", f"{times['warm']:.1f}")
        return [table]


def startup(config_flags: Sequence[str]) -> Startup:
    """Prepares the corpus of the config in a folder of its own, then starts training and sampling, each twice."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepared, trained = folder / "prepared", folder / "trained"
        command = [sys.executable, str(LAUNCH / "prepare.py"), *config_flags, f"--workdir={prepared}"]
        if reason := run(command).reason:
            raise ValueError(f"--startup: launch/prepare.py ended with {reason}; run it by itself to see what it says")
        times: dict[str, dict[str, float]] = {"train": {}, "sample": {}}
        for cache in ("cold", "warm"):
            shutil.rmtree(trained, ignore_errors=True)
            shutil.copytree(prepared, trained)
            times["train"][cache] = first_step(config_flags, trained, folder / "xla")
        for cache in ("cold", "warm"):
            times["sample"][cache] = first_text(trained, folder / "xla_sample")
    return Startup(**times)


def first_step(config_flags: Sequence[str], workdir: Path, cache: Path) -> float:
    """Seconds until `train.py` has recorded its first step; it is then asked to save and stop."""
    metrics = workdir / "metrics.jsonl"
    flags = [*config_flags, "--config.metrics.every_steps=1", f"--workdir={workdir}"]
    with _start("train", flags, cache) as (process, start_time):
        while process.poll() is None and time.perf_counter() - start_time < START_TIMEOUT:
            if metrics.exists() and '"kind": "train"' in metrics.read_text():
                seconds = time.perf_counter() - start_time
                process.send_signal(signal.SIGTERM)
                process.wait(START_TIMEOUT)
                return seconds
            time.sleep(0.02)
    raise ValueError("--startup: launch/train.py made no step; run it by itself to see what it says")


def first_text(workdir: Path, cache: Path) -> float:
    """Seconds until `sample.py` has written something."""
    with _start("sample", [f"--workdir={workdir}"], cache) as (process, start_time):
        assert process.stdout is not None
        first_byte = process.stdout.read(1)
        seconds = time.perf_counter() - start_time
        process.stdout.read()
    if not first_byte:
        raise ValueError("--startup: launch/sample.py wrote nothing; run it by itself to see what it says")
    return seconds


@contextlib.contextmanager
def _start(script: str, flags: Sequence[str], cache: Path) -> Iterator[tuple[subprocess.Popen, float]]:
    """A running launch script, with its own cache of compiled programs, and its start time."""
    command = [sys.executable, str(LAUNCH / f"{script}.py"), *flags]
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env["XDG_CACHE_HOME"] = str(cache)  # compiled programs are kept in it
    start_time = time.perf_counter()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            yield process, start_time
        finally:
            process.kill()
