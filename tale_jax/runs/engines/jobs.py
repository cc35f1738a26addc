"""Many trainings, each a command of its own: what an engine is given, and what it tells.

    engine = make_engine("local", Resources(cpus=2, memory=4 << 30), max_jobs=0)
    engine.run(jobs, on_end=lambda job, end: say(f"{job.name}: {end.reason or 'done'}"), signals=signals)

An engine starts the commands, as many at once as it has room for, and says how each ended. A signal makes it ask those
that run to save and end. What a run has reached is in its workdir, so that another engine may go on with it.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tale_jax.config import Config, leaves
from tale_jax.hardware.machine import total_memory
from tale_jax.utils.extras import has_library, missing_extra
from tale_jax.utils.format import format_bytes
from tale_jax.utils.settings import mistake
from tale_jax.utils.signals import StopSignals
from tale_jax.utils.subprocesses import PACKAGE_ROOT, run

ENGINES = ("local", "ray", "slurm")
SAVED_CONFIG = PACKAGE_ROOT / "tale_jax" / "runs" / "saved_config.py"
SCORE_FILE = "score.json"  # in the workdir of a run that is done: the whole valid split, scored
MAX_REASON_CHARS = 300
TAIL_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
      name: short, and a file's name.
      command: of a process that trains, writes `score`, and saves and ends at SIGTERM; the same one goes on.
      workdir: of the run, an absolute path.
      log: file that what the process says is added to.
      folder: where the command is given: paths in the settings may be relative to it.
      total_steps: of the run; 0: not known yet.
    """

    name: str
    command: tuple[str, ...]
    workdir: Path
    log: Path
    folder: Path
    total_steps: int = 0

    @property
    def score(self) -> Path:
        return self.workdir / SCORE_FILE


@dataclasses.dataclass(frozen=True)
class End:
    """How a process ended: `reason` in words, "" with exit code 0; and whether the engine stopped it for others that
    are better."""

    reason: str = ""
    stopped_early: bool = False


@dataclasses.dataclass(frozen=True)
class Resources:
    """What each run takes: `cpus` cores, `gpus`, `memory` in bytes; 0: not stated."""

    cpus: float | int = 0.0
    gpus: int = 0
    memory: int = 0


OnEnd = Callable[[Job, End], None]


@runtime_checkable
class Engine(Protocol):
    """Where trainings run."""

    def run(self, jobs: Sequence[Job], on_end: OnEnd, signals: StopSignals) -> None:
        """Starts the jobs, and returns when all have ended; after a signal those that run save first.

        `on_end` is called for each that ended, not for those that a signal kept from starting.
        """
        ...


def make_engine(name: str, resources: Resources, max_jobs: int | None = None, stop_early: bool = False) -> Engine:
    """The engine of a name in `ENGINES`.

    Args:
      name: of it.
      resources: of each run.
      max_jobs: how many run at once at most; 0: as many as fit; None: on this machine one, else as many as fit.
      stop_early: whether runs that are worse than others are stopped (Ray only).

    Raises:
      ValueError: one line, for what this machine lacks, or the engine cannot do.
    """
    for field, value in {"cpus": resources.cpus, "gpus": resources.gpus, "jobs": max_jobs or 0}.items():
        if not 0 <= value < math.inf:
            raise mistake(field, value, "not be negative", f"leave --{field} out")
    if stop_early and name != "ray":
        raise ValueError(f"--stop_early must go with Ray, and not with --engine={name}; set --engine=ray")
    if name == "ray":
        if not has_library("ray"):
            raise ValueError(f"{missing_extra('--engine=ray', 'Ray', 'ray')}; or leave --engine out")
        from tale_jax.runs.engines.ray_tune import RayEngine

        return RayEngine(resources, max_jobs or 0, stop_early)
    if name == "slurm":
        from tale_jax.runs.engines.slurm import SlurmEngine

        return SlurmEngine(resources, max_jobs or 0)
    from tale_jax.runs.engines.local import LocalEngine

    return LocalEngine(1 if max_jobs is None else max_jobs, *slots(resources))


def slots(resources: Resources) -> tuple[int, list[list[str]]]:
    """How many runs fit on this machine at once, and for each of them the GPUs that it sees ([]: all runs see all).

    Raises ValueError, in one line, where not even one fits.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if resources.cpus > cores:
        raise mistake("cpus", resources.cpus, f"be at most {cores}, the cores of this machine", f"try --cpus={cores}")
    if (memory := total_memory()) and resources.memory > memory:
        rule = f"be at most {format_bytes(memory)}, the memory of this machine"
        raise mistake("memory", format_bytes(resources.memory), rule, f"try --memory={memory // 10**6}MB")
    gpus = visible_gpus() if resources.gpus else []
    if resources.gpus > len(gpus):
        remedy = f"try --gpus={len(gpus)}" if gpus else "leave --gpus out"
        raise mistake("gpus", resources.gpus, f"be at most {len(gpus)}, the GPUs that are found here", remedy)
    fit = [cores]  # one core each, where nothing is stated
    fit += [int(cores / resources.cpus)] if resources.cpus else []
    fit += [memory // resources.memory] if memory and resources.memory else []
    fit += [len(gpus) // resources.gpus] if resources.gpus else []
    count = max(1, min(fit))
    shares = [gpus[i * resources.gpus : (i + 1) * resources.gpus] for i in range(count)] if resources.gpus else []
    return count, shares


def visible_gpus() -> list[str]:
    """The GPUs of NVIDIA that a process here may use, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    listing = run(["nvidia-smi", "-L"], timeout=30).stdout
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listing.splitlines()))]


def make_job(name: str, config: Config, given: Mapping[str, Any], workdir: Path, folder: Path) -> Job:
    """The training of a config in a workdir; its settings and its log are kept in `folder`.

    Args:
      name: of the job.
      config: of the run.
      given: settings that were asked for, by dotted name, which no choice of the program may change.
      workdir: of the run.
      folder: for `settings/NAME/config.json` and `logs/NAME.txt`.
    """
    settings, logs = (folder / "settings" / name).resolve(), (folder / "logs").resolve()
    settings.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    workdir = workdir.resolve()
    config.save(settings)
    values = dict(leaves(config))
    recipe = str(SAVED_CONFIG) if ":" not in str(SAVED_CONFIG) else os.path.relpath(SAVED_CONFIG)
    flags = [f"--config={recipe}:{settings}", *(f"--config.{field}={values[field]}" for field in given)]
    score = f"--score={workdir / SCORE_FILE}"
    command = (sys.executable, str(PACKAGE_ROOT / "launch" / "train.py"), *flags, f"--workdir={workdir}", score)
    return Job(name, command, workdir, logs / f"{name}.txt", Path.cwd(), config.total_steps)


def last_line(log: Path) -> str:
    """The last line that a process has said; "" where it has said nothing."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:MAX_REASON_CHARS] if lines else ""


def end_of(code: int) -> End:
    """The end of a process with this exit code; negative: the number of the signal that killed it."""
    return End(f"signal {-code}" if code < 0 else f"exit code {code}" if code else "")
