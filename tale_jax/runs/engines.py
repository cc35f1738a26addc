"""Who runs many trainings: this machine, a Slurm cluster, or Ray. Each run is a command with a log of its own.

    engine = make_engine("local", Resources(jobs=2))
    signal = engine([Task("a", ["python", "launch/train.py", …], Path("a.log"))], on_end=print)

An engine starts what it has room for, tells how each run ended as soon as it has, and returns when all have, or with
the number of the signal that asked it to stop: then the runs under way were asked to save, and those that wait were not
started.
"""

import dataclasses
import os
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tale_jax.hardware.machine import total_memory
from tale_jax.utils.format import format_bytes, parse_bytes
from tale_jax.utils.signals import StopSignals
from tale_jax.utils.streams import notice
from tale_jax.utils.subprocesses import Logged, last_line, run

POLL_SECONDS = 0.1
SLURM_POLL_SECONDS = 2.0
ENGINES = ("local", "slurm", "ray")
# States of Slurm (man squeue) in which a job still goes on, or will; all others are ends.
GOING = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING"}
GOING |= {"SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "PREEMPTED", "RESV_DEL_HOLD"}


@dataclasses.dataclass(frozen=True)
class Task:
    """A run: what it is called, its command, and the file that gets what it says (appended to)."""

    name: str
    command: Sequence[str]
    log: Path


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended: its exit code (None where nobody knows it), and the last line that it said."""

    code: int | None
    last_line: str


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of each run.

    Attributes:
      jobs: runs at a time, of the engine local; the others start what their cluster has room for.
      cpus: cores; 0: all, shared by the runs of this machine.
      gpus: none where it is 0.
      memory: as "4GB"; "": not limited.
    """

    jobs: int = 1
    cpus: int = 0
    gpus: int = 0
    memory: str = ""

    def __post_init__(self) -> None:
        for name, least in (("jobs", 1), ("cpus", 0), ("gpus", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}={value} must be at least {least}; try --{name}={least}")

    @property
    def memory_bytes(self) -> int:
        """0 where it is not limited. Raises ValueError, in one line, for text that is no size."""
        return parse_bytes(self.memory) if self.memory else 0


OnEnd = Callable[[Task, Ending], None]
Engine = Callable[[Sequence[Task], OnEnd], int]


def make_engine(name: str, resources: Resources) -> Engine:
    """The engine of this name. Raises ValueError, in one line, where what it needs is not here."""
    if name == "local":
        return _Local(resources)
    if resources.jobs > 1:
        raise ValueError(f"jobs={resources.jobs} is of --engine=local; {name} starts what its cluster has room for")
    return _Slurm(resources) if name == "slurm" else _Ray(resources)


class _Local:
    """Processes of this machine; each gets cores of its own where several run at a time."""

    def __init__(self, resources: Resources):
        cores, jobs = _usable_cores(), resources.jobs
        cpus = resources.cpus or max(1, len(cores) // jobs)
        if jobs * cpus > len(cores):
            raise ValueError(
                f"jobs={jobs} of {cpus} cores must fit the {len(cores)} of this machine; "
                f"try --jobs={max(1, len(cores) // cpus)}"
            )
        total = total_memory()
        if total and jobs * resources.memory_bytes > total:
            raise ValueError(
                f"jobs={jobs} of memory={resources.memory} must fit the {format_bytes(total)} of this machine; "
                f"try --jobs=1 --memory={total // jobs >> 20}MB"
            )
        shared = jobs > 1 or resources.cpus
        self._cores = [cores[slot * cpus : (slot + 1) * cpus] if shared else [] for slot in range(jobs)]
        self._gpus = resources.gpus

    def __call__(self, tasks: Sequence[Task], on_end: OnEnd) -> int:
        waiting, running = deque(tasks), dict[int, tuple[Task, Logged]]()  # by slot
        asked = False
        with StopSignals() as signals:
            while running or (waiting and not signals.number):
                for slot, cores in enumerate(self._cores):
                    if slot not in running and waiting and not signals.number:
                        task = waiting.popleft()
                        running[slot] = task, Logged(task.command, task.log, cores, self._env_of(slot))
                if signals.number and not asked:
                    asked = True
                    for _, process in running.values():
                        process.ask_to_stop()
                for slot, (task, process) in list(running.items()):
                    if (code := process.exit_code()) is not None:
                        del running[slot]
                        on_end(task, Ending(code, last_line(task.log)))
                time.sleep(POLL_SECONDS)
        return signals.number

    def _env_of(self, slot: int) -> dict[str, str]:
        """Which GPUs the run of a slot sees, where it was said how many it gets."""
        if not self._gpus:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(str(slot * self._gpus + each) for each in range(self._gpus))}


def _usable_cores() -> list[int]:
    """The processors that this process may use, by number."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


class _Slurm:
    """A job for each run, by sbatch. A job that is preempted is queued again, and its run goes on."""

    def __init__(self, resources: Resources):
        self._options = [f"--cpus-per-task={resources.cpus}"] if resources.cpus else []
        self._options += [f"--gres=gpu:{resources.gpus}"] if resources.gpus else []
        self._options += [f"--mem={resources.memory_bytes >> 20}M"] if resources.memory else []
        if (found := run(["sbatch", "--version"])).reason:
            raise ValueError(f"engine=slurm needs sbatch ({found.reason}); start it where jobs are submitted")

    def __call__(self, tasks: Sequence[Task], on_end: OnEnd) -> int:
        jobs, asked = dict[str, Task](), False
        with StopSignals() as signals:
            for task in tasks:
                result = run(self._submission(task))
                if result.reason:
                    on_end(task, Ending(None, f"not submitted: {result.reason}"))
                else:
                    jobs[result.stdout.strip().partition(";")[0]] = task
            if jobs:
                notice(f"{len(jobs)} jobs are submitted: {', '.join(jobs)}")
            while jobs:
                if signals.number and not asked:
                    asked = True
                    run(["scancel", "--state=PENDING", *jobs])
                    run(["scancel", "--batch", "--signal=TERM", *jobs])
                states = _slurm_states(jobs)
                for job in list(jobs):
                    state, code = states.get(job, ("unknown", None))
                    if state not in GOING:
                        task = jobs.pop(job)
                        said = last_line(task.log)
                        on_end(task, Ending(code, said if state in ("COMPLETED", "FAILED") else f"{state}: {said}"))
                time.sleep(SLURM_POLL_SECONDS if jobs else 0)
        return signals.number

    def _submission(self, task: Task) -> list[str]:
        words = ["sbatch", "--parsable", f"--job-name={task.name[:60]}", f"--output={task.log}", "--open-mode=append"]
        words += ["--requeue", "--signal=B:TERM@60", *self._options]  # asked to save a minute before its time is over
        return [*words, f"--chdir={os.getcwd()}", f"--wrap=exec {shlex.join(task.command)}"]


def _slurm_states(jobs: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """State and exit code of each job: by sacct, and by scontrol where there is no accounting."""
    jobs, states = list(jobs), dict[str, tuple[str, int | None]]()
    found = run(["sacct", "-X", "-n", "-P", "-o", "JobIDRaw,State,ExitCode", "-j", ",".join(jobs)])
    for line in found.stdout.splitlines() if not found.reason else ():
        job, state, code = line.split("|")
        states[job] = state.split()[0], _exit_code(code)  # "CANCELLED by 0"
    for job in jobs if not states else ():
        shown = run(["scontrol", "--oneliner", "show", "job", job])
        fields = {name: value for name, _, value in (word.partition("=") for word in shown.stdout.split())}
        if "JobState" in fields:
            states[job] = fields["JobState"], _exit_code(fields.get("ExitCode", ""))
    return states


def _exit_code(text: str) -> int | None:
    """Of CODE:SIGNAL, as a shell has it."""
    code, _, number = text.partition(":")
    if not (code.isdigit() and number.isdigit()):
        return None
    return int(code) or (128 + int(number) if int(number) else 0)


class _Ray:
    """A task of Ray for each run; the cluster is that of RAY_ADDRESS, or one that is started here."""

    def __init__(self, resources: Resources):
        try:
            import ray
        except ImportError:
            raise ValueError("engine=ray needs Ray; install it: make env EXTRAS=dev,ray") from None
        self._ray = ray
        self._options: Mapping[str, Any] = {
            "num_cpus": resources.cpus or 1,
            "num_gpus": resources.gpus,
            "max_retries": 3,  # of a node that is lost
            **({"memory": resources.memory_bytes} if resources.memory else {}),
        }

    def __call__(self, tasks: Sequence[Task], on_end: OnEnd) -> int:
        ray, asked = self._ray, False
        with StopSignals() as signals:
            if not ray.is_initialized():
                ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
            remote = ray.remote(**self._options)(_run_to_its_end)
            left = {remote.remote(list(task.command), str(task.log)): task for task in tasks}
            while left:
                if signals.number and not asked:
                    asked = True
                    for reference in left:
                        ray.cancel(reference)
                done, _ = ray.wait(list(left), timeout=POLL_SECONDS)
                for reference in done:
                    task, code = left.pop(reference), None
                    try:
                        code, said = ray.get(reference), last_line(task.log)
                    except ray.exceptions.TaskCancelledError:
                        code, said = 128 + signals.number, "stopped"
                    except ray.exceptions.RayError as error:
                        said = " ".join(str(error).split())
                    on_end(task, Ending(code, said))
            ray.shutdown()
        return signals.number


def _run_to_its_end(command: Sequence[str], log: str) -> int:
    """On a worker of Ray: the exit code; a task that is cancelled lets its run save first."""
    process = Logged(command, Path(log))
    try:
        while (code := process.exit_code()) is None:
            time.sleep(POLL_SECONDS)
        return code
    except BaseException:
        process.ask_to_stop()
        process.wait()
        raise
