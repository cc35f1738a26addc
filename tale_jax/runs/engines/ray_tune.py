"""Trainings on a Ray cluster, or on one that is started on this machine; with ASHA those that fall behind are stopped.

Ray Tune schedules them by the resources that each run declares. A trial is a process of launch/train.py, and tells Ray
what that has written into metrics.jsonl. Ray is an extra: make env EXTRAS=dev,ray

Li et al., A System for Massively Parallel Hyperparameter Tuning (ASHA), 2018, arXiv:1810.05934.
"""

import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from tale_jax.runs.engines.jobs import End, Job, OnEnd, Resources, end_of
from tale_jax.runs.records import read_metrics
from tale_jax.utils.locks import is_locked
from tale_jax.utils.settings import mistake
from tale_jax.utils.signals import SAVING, StopSignals
from tale_jax.utils.subprocesses import PACKAGE_ROOT, LoggedProcess

LOOK_SECONDS = 1.0
ENVIRONMENT = {
    "RAY_process_group_cleanup_enabled": "1",  # with a worker that is killed, its training ends
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `StopSignals` hears it
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a run has its own records
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",
}
RUNGS = 3  # ASHA looks at a run after 1/9 and 1/3 of its steps, and lets the best third go on


class Trial(tune.Trainable):
    """One training, in a process of its own."""

    def setup(self, config: dict[str, Any]) -> None:
        job = config["job"]
        self._workdir, self._process = Path(job["workdir"]), None
        self._command, self._log, self._folder = job["command"], Path(job["log"]), job["folder"]

    def step(self) -> dict[str, Any]:
        """What the run has reached by now."""
        time.sleep(LOOK_SECONDS)
        code = None
        if self._process is not None:
            code = self._process.poll()
        elif not is_locked(self._workdir):  # else an earlier process still trains it
            os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it, and a run is to compute as it does without
            self._process = LoggedProcess(self._command, self._log, folder=self._folder)
        valid = read_metrics(self._workdir).get("valid", [])
        last = next((r for r in reversed(valid) if r.get("bits_per_byte") is not None), {})
        reached = {"steps": last.get("step", 0), "bits_per_byte": last.get("bits_per_byte", math.inf)}
        return reached | {"code": code, "done": code is not None}

    def cleanup(self) -> None:
        """Lets the training save and end."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


class _OfThisProcess:
    """What Ray Tune writes down of its settings to restore them has nothing of these: the workdirs have it."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class _Stopper(_OfThisProcess, tune.Stopper):
    """Ends all trials after a signal."""

    def __init__(self, signals: StopSignals):
        self._signals = signals

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._signals.number)


class _Teller(_OfThisProcess, tune.Callback):
    """Says which job has ended, and how."""

    def __init__(self, jobs: dict[str, Job], on_end: OnEnd, signals: StopSignals):
        self._jobs, self._on_end, self._signals = jobs, on_end, signals

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        code = (trial.last_result or {}).get("code")
        end = End("stopped", not self._signals.number) if code is None else end_of(code)
        self._on_end(self._jobs[trial.config["job"]["name"]], end)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        reason = " ".join(str(trial.get_error() or "its worker was lost").split())
        self._on_end(self._jobs[trial.config["job"]["name"]], End(f"Ray: {reason[-200:]}"))


class RayEngine:
    """Runs trainings by Ray Tune, up to `max_jobs` at once (0: as many as there are resources for)."""

    def __init__(self, resources: Resources, max_jobs: int, stop_early: bool):
        self._resources, self._max_jobs, self._stop_early = resources, max_jobs, stop_early

    def run(self, jobs: Sequence[Job], on_end: OnEnd, signals: StopSignals) -> None:
        """As `Engine.run` says. Raises ValueError, in one line, where runs of no known length are to be stopped."""
        if not jobs:
            return
        if self._stop_early and not all(job.total_steps for job in jobs):
            raise mistake("total_steps", 0, "be known where runs are stopped early", "try --config.total_steps=1000")
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        usual = {number: signal.getsignal(number) for number in SAVING}
        path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))
        ray.init(
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=False if not os.environ.get("RAY_ADDRESS") else None,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
        for number, handler in usual.items():
            signal.signal(number, handler)  # Ray has taken SIGTERM
        try:
            self._tuner(jobs, on_end, signals).fit()
        finally:
            ray.shutdown()

    def _tuner(self, jobs: Sequence[Job], on_end: OnEnd, signals: StopSignals) -> tune.Tuner:
        wanted = {"cpu": self._resources.cpus or 1, "gpu": self._resources.gpus, "memory": self._resources.memory}
        trials = [
            {
                "name": job.name,
                "command": list(job.command),
                "workdir": str(job.workdir),
                "log": str(job.log),
                "folder": str(job.folder),
            }
            for job in jobs
        ]
        storage = jobs[0].log.parent.parent / "ray"
        storage.mkdir(exist_ok=True)
        return tune.Tuner(
            tune.with_resources(Trial, {name: value for name, value in wanted.items() if value}),
            param_space={"job": tune.grid_search(trials)},
            tune_config=tune.TuneConfig(
                metric="bits_per_byte",
                mode="min",
                scheduler=self._scheduler(max(job.total_steps for job in jobs)),
                max_concurrent_trials=self._max_jobs or None,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(storage),
                stop=_Stopper(signals),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a run has its own
                callbacks=[_Teller({job.name: job for job in jobs}, on_end, signals)],
                verbose=0,
            ),
        )

    def _scheduler(self, total_steps: int) -> Any:
        if not self._stop_early:
            return FIFOScheduler()
        first = max(1, total_steps // 3 ** (RUNGS - 1))
        # A step more than a run has: the last one is saved and scored, and is not what a run is stopped at.
        return ASHAScheduler(time_attr="steps", max_t=total_steps + 1, grace_period=first, reduction_factor=3)
