"""What it costs that a checkpoint can be trusted: seconds of a save, and the share of them that its checks take.

Saved is the state of a run as training saves it, into a temporary folder; the checks are those of
`training/checkpoint.py`: numbers that are not finite, a digest of each array, and the sums of all files. They are timed
by themselves, on the same state and the same files. Of a run the share is that of one save every
`checkpoint.every_steps`.

    python launch/bench.py --config=configs/m2_air.py --saving
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from tale_jax.bench.throughput import Bench, Timing, repeat
from tale_jax.model.transformer import count_parameters
from tale_jax.training.checkpoint import Checkpoints, digests, first_not_finite, max_concurrent_bytes, num_bytes
from tale_jax.utils.manifests import MANIFEST, make_manifest

SAVES = 5


@dataclasses.dataclass(frozen=True)
class SavingCost:
    """Timings of one config: of whole saves, of each of their checks, and of a training step."""

    params: int
    state_bytes: int
    save: Timing
    checks: dict[str, Timing]
    step: Timing
    every_steps: int

    @property
    def check_seconds(self) -> float:
        return sum(timing.median for timing in self.checks.values())

    @property
    def share_of_save(self) -> float:
        return self.check_seconds / self.save.median

    @property
    def share_of_run(self) -> float:
        """0 where a run saves at its end only."""
        interval = self.every_steps * self.step.median + self.save.median
        return self.check_seconds / interval if self.every_steps else 0.0

    def record(self) -> dict[str, Any]:
        return {
            "params": self.params,
            "state_bytes": self.state_bytes,
            "save_seconds": self.save.median,
            "check_seconds": {name: timing.median for name, timing in self.checks.items()},
            "share_of_save": self.share_of_save,
            "step_seconds": self.step.median,
            "every_steps": self.every_steps,
            "share_of_run": self.share_of_run,
        }

    def tables(self) -> list[Table]:
        table = Table("", "seconds", "share of a save", box=None, header_style="bold")
        for column in table.columns[1:]:
            column.justify = "right"
        table.add_row(f"a save of {self.state_bytes / 1e6:,.0f} MB", f"{self.save.median:.3f}", "")
        for name, timing in self.checks.items():
            table.add_row(f"  {name}", f"{timing.median:.4f}", f"{timing.median / self.save.median:.2%}")
        table.add_row("  all checks", f"{self.check_seconds:.4f}", f"{self.share_of_save:.2%}")
        every = f"saving every {self.every_steps} steps" if self.every_steps else "saving at its end"
        table.add_row(f"a step, {every}", f"{self.step.median:.3f}", f"{self.share_of_run:.3%} of the run")
        return [table]


def saving(bench: Bench) -> SavingCost:
    """Measures saves and their checks; the first save, which is read again, is not among them."""
    trainer = bench.trainer
    state = bench.step(trainer.init())
    throttle = max_concurrent_bytes(trainer.abstract_state.replace(base=None), bench.backend.overlap_io)
    with tempfile.TemporaryDirectory(prefix="tale_jax-") as folder:
        checkpoints, times = Checkpoints(Path(folder), 1, throttle), []
        for step in range(1, SAVES + 2):
            start_time = time.perf_counter()
            checkpoints.save(step, state, {}, None)
            checkpoints.wait()
            times.append(time.perf_counter() - start_time)
        saved = checkpoints.folder / str(SAVES + 1)
        (saved / MANIFEST).unlink()
        items = {"params": state.params, "opt_state": state.opt_state, "ema": state.ema_params}
        checks = {
            "numbers that are not finite": lambda: first_not_finite(items),
            "digests of arrays": lambda: digests(items),
            "sums of files": lambda: make_manifest(saved, {}),
        }
        timings = {name: repeat(check, 0.0, min_repetitions=SAVES) for name, check in checks.items()}
        size = num_bytes(items)
        checkpoints.close()

    def step_once() -> None:
        nonlocal state
        state = bench.step(state)

    params = count_parameters(jax.eval_shape(lambda: state.params))
    timing = repeat(step_once, 0.0, min_repetitions=3, warmup=1)
    return SavingCost(params, size, Timing(tuple(times[1:])), timings, timing, bench.config.checkpoint.every_steps)
