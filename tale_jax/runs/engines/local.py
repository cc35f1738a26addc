"""Trainings as processes of this machine, so many at once; nothing else is needed."""

import time
from collections import deque
from collections.abc import Sequence

from tale_jax.runs.engines.jobs import Job, OnEnd, end_of
from tale_jax.utils.locks import is_locked
from tale_jax.utils.signals import StopSignals
from tale_jax.utils.streams import notice
from tale_jax.utils.subprocesses import LoggedProcess

POLL_SECONDS = 0.1


class LocalEngine:
    """Runs up to `max_jobs` trainings at once (0: as many as fit), each with its share of the GPUs."""

    def __init__(self, max_jobs: int, num_fitting: int, gpus: Sequence[Sequence[str]] = ()):
        self.num_slots = min(max_jobs or num_fitting, num_fitting)
        self._gpus = gpus

    def run(self, jobs: Sequence[Job], on_end: OnEnd, signals: StopSignals) -> None:
        """As `Engine.run` says. A run that another process still trains, one of an earlier command that was killed
        alone, is waited for."""
        waiting, running = deque(jobs), {}
        free, told, is_stopping = list(range(self.num_slots)), set(), False
        try:
            while waiting or running:
                if signals.number and not is_stopping:
                    is_stopping = True
                    waiting.clear()
                    for _, process in running.values():
                        process.terminate()
                for _ in range(len(waiting) if free else 0):
                    job = waiting.popleft()
                    if is_locked(job.workdir):
                        if job.name not in told:
                            told.add(job.name)
                            notice(f"{job.workdir} is in use by another process; its run is waited for")
                        waiting.append(job)
                    elif free:
                        slot = free.pop(0)
                        running[job] = slot, LoggedProcess(job.command, job.log, self._environ(slot), job.folder)
                    else:
                        waiting.appendleft(job)
                        break
                for job, (slot, process) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[job]
                        free.append(slot)
                        on_end(job, end_of(code))
                time.sleep(POLL_SECONDS)
        finally:
            for _, process in running.values():  # after an error here they must not go on unseen
                process.terminate()

    def _environ(self, slot: int) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus[slot])} if self._gpus else {}
