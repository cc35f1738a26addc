"""Trainings as jobs of a Slurm cluster, one each: by sbatch, and watched by sacct, or scontrol without accounting.

All nodes must see the checkout, its Python and the folder of the runs under the same paths. A job that is preempted, or
whose time ends, saves and goes back into the queue. Jobs outlive a command that is killed, and the same command finds
them again.
"""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from tale_jax.runs.engines.jobs import End, Job, OnEnd, Resources
from tale_jax.utils.files import write_atomically
from tale_jax.utils.signals import StopSignals
from tale_jax.utils.subprocesses import run

POLL_SECONDS, COMMAND_SECONDS = 5.0, 120.0
# A state in which a job stays, the letters before a + or a blank. From others it goes on.
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
NOT_STARTED = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
# 143 is 128 + SIGTERM: all is saved, and the job was told to end by its time limit or for another job; a command that
# was stopped leaves the file `stop` first.
SCRIPT = """\
#!/bin/bash
srun --ntasks=1 --kill-on-bad-exit=0 ${{SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}} {command}
code=$?
if [ "$code" -eq 143 ] && [ ! -e {stop} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


class SlurmEngine:
    """Submits up to `max_jobs` trainings at once (0: all of them)."""

    def __init__(self, resources: Resources, max_jobs: int):
        self._max_jobs = max_jobs
        self._flags = [f"--cpus-per-task={max(1, round(resources.cpus))}"] if resources.cpus else []
        self._flags += [f"--gpus={resources.gpus}"] if resources.gpus else []
        self._flags += [f"--mem={max(1, resources.memory >> 20)}M"] if resources.memory else []

    def run(self, jobs: Sequence[Job], on_end: OnEnd, signals: StopSignals) -> None:
        """As `Engine.run` says. Raises ValueError, in one line, where Slurm takes no job."""
        waiting, running = list(jobs), {}
        states = {number: self._state(number) for job in jobs if (number := _known_number(job))}
        for job in jobs:  # those that an earlier command has submitted
            if (number := _known_number(job)) and (state := states[number]) and state[0] not in ENDED:
                running[job] = number
                waiting.remove(job)
        is_stopping = False
        while waiting or running:
            if signals.number and not is_stopping:
                is_stopping = True
                waiting.clear()
                for job, number in running.items():
                    self._stop(job, number)
            while waiting and (not self._max_jobs or len(running) < self._max_jobs):
                job = waiting.pop(0)
                running[job] = self._submit(job)
            end = time.monotonic() + POLL_SECONDS
            while time.monotonic() < end and not (signals.number and not is_stopping):
                time.sleep(0.2)
            for job, number in list(running.items()):
                state = self._state(number)
                if state is None or state[0] in ENDED:
                    del running[job]
                    was_stopped = _file(job, "stop").exists() and not job.score.is_file()
                    if was_stopped and not signals.number:  # by an earlier command, for which it has just saved
                        waiting.append(job)
                    else:
                        on_end(job, _end(job, state))

    def _submit(self, job: Job) -> str:
        """The number of a new job for a run."""
        _file(job, "stop").unlink(missing_ok=True)
        script = SCRIPT.format(command=shlex.join(job.command), stop=shlex.quote(str(_file(job, "stop"))))
        how = [f"--job-name={job.name}", f"--output={job.log}", "--open-mode=append", f"--chdir={job.folder}"]
        saving = ["--ntasks=1", "--requeue", "--signal=TERM@120"]
        command = ["sbatch", "--parsable", *how, *saving, *self._flags]
        submitted = run(command, stdin=script, timeout=COMMAND_SECONDS)
        if submitted.reason:
            raise ValueError(f"Slurm takes no job ({submitted.reason}); see `sinfo`, or leave --engine out")
        number = submitted.stdout.strip().partition(";")[0]
        write_atomically(_file(job, "slurm"), number + "\n")
        return number

    def _state(self, number: str) -> tuple[str, str] | None:
        """The state of a job and its exit code, as code:signal; None where Slurm does not know it any more."""
        listing = run(["sacct", "-X", "-n", "-P", "-o", "JobID,State,ExitCode", "-j", number], timeout=COMMAND_SECONDS)
        for line in listing.stdout.splitlines() if not listing.reason else ():
            fields = line.split("|")
            if len(fields) == 3 and fields[0] == number:
                return _word(fields[1]), fields[2]
        shown = run(["scontrol", "--oneliner", "show", "job", number], timeout=COMMAND_SECONDS)
        if shown.reason and "Invalid job id" not in shown.stderr:
            return "UNKNOWN", ""  # the controller does not answer now
        words = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)
        return (_word(words["JobState"]), words.get("ExitCode", "")) if "JobState" in words else None

    def _stop(self, job: Job, number: str) -> None:
        """Lets a job save and end; one that waits in the queue leaves it."""
        write_atomically(_file(job, "stop"), "")
        state = self._state(number)
        if state and state[0] in NOT_STARTED:
            run(["scancel", number], timeout=COMMAND_SECONDS)
        else:
            run(["scancel", "--signal=TERM", number], timeout=COMMAND_SECONDS)


def _end(job: Job, state: tuple[str, str] | None) -> End:
    if job.score.is_file():
        return End()
    if state is None:
        return End("Slurm has forgotten the job")
    return End(f"{state[0]}, exit code {state[1].partition(':')[0]}")


def _word(state: str) -> str:
    """CANCELLED of "CANCELLED by 0", COMPLETED of "COMPLETED+"."""
    return (state.split() or [""])[0].rstrip("+")


def _file(job: Job, kind: str) -> Path:
    return job.log.with_name(f"{job.name}.{kind}")


def _known_number(job: Job) -> str:
    try:
        return _file(job, "slurm").read_text().strip()
    except OSError:
        return ""
