"""What it costs that a checkpoint can be trusted: seconds of a save, beside the same arrays saved by orbax alone.

Saved is the state of a run as training saves it, into a temporary folder. Checks are the digests of arrays, which tell
numbers that are not finite, too, and the sums of files; both are taken while orbax writes, so that they add less to a
save than they take by themselves. Saves with and without them take turns, and both end when all files are synced. Of a
run the share is that of one save every `checkpoint.every_steps`.

    python launch/bench.py --config=configs/m2_air.py --saving
"""

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from rich.table import Table

from tale_jax.bench.throughput import Bench, Timing, repeat
from tale_jax.model.transformer import count_parameters
from tale_jax.training.checkpoint import (
    Checkpoints,
    arrays_of,
    digests,
    item_handlers,
    max_concurrent_bytes,
    num_bytes,
)
from tale_jax.utils.files import sync_folders
from tale_jax.utils.manifests import MANIFEST, files_below, make_manifest

SAVES = 9


@dataclasses.dataclass(frozen=True)
class SavingCost:
    """Timings of one config: of whole saves, of orbax's alone, of the checks by themselves, and of a training step."""

    params: int
    state_bytes: int
    save: Timing
    plain: Timing
    checks: dict[str, Timing]
    step: Timing
    every_steps: int

    @property
    def added_seconds(self) -> float:
        return self.save.median - self.plain.median

    @property
    def share_of_save(self) -> float:
        return self.added_seconds / self.plain.median

    @property
    def share_of_run(self) -> float:
        """0 where a run saves at its end only."""
        interval = self.every_steps * self.step.median + self.plain.median
        return self.added_seconds / interval if self.every_steps else 0.0

    def record(self) -> dict[str, Any]:
        return {
            "params": self.params,
            "state_bytes": self.state_bytes,
            "save_seconds": self.save.median,
            "plain_save_seconds": self.plain.median,
            "check_seconds": {name: timing.median for name, timing in self.checks.items()},
            "share_of_save": self.share_of_save,
            "step_seconds": self.step.median,
            "every_steps": self.every_steps,
            "share_of_run": self.share_of_run,
        }

    def tables(self) -> list[Table]:
        table = Table("", "seconds", "", box=None, header_style="bold")
        for column in table.columns[1:]:
            column.justify = "right"
        table.add_row(f"{self.state_bytes / 1e6:,.0f} MB saved by orbax alone", f"{self.plain.median:.3f}", "")
        table.add_row("saved with checks", f"{self.save.median:.3f}", f"{self.share_of_save:+.2%}")
        for name, timing in self.checks.items():
            table.add_row(f"  {name}, by themselves", f"{timing.median:.4f}", "")
        every = f"saving every {self.every_steps} steps" if self.every_steps else "saving at its end"
        table.add_row(f"a step, {every}", f"{self.step.median:.3f}", f"{self.share_of_run:+.3%} of the run")
        return [table]


def saving(bench: Bench) -> SavingCost:
    """Measures saves and their checks; the first of each kind is not among them."""
    trainer = bench.trainer
    state = bench.step(trainer.init())
    throttle = max_concurrent_bytes(trainer.abstract_state.replace(base=None), bench.backend.overlap_io)
    arrays = arrays_of(state)
    with tempfile.TemporaryDirectory(prefix="tale_jax-") as folder:
        checkpoints, times, plain_times = Checkpoints(Path(folder) / "run", 1, throttle), [], []
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=not throttle)
        plain_folder = Path(folder) / "plain"
        plain = ocp.CheckpointManager(plain_folder, options=options, item_handlers=item_handlers(throttle))
        for step in range(1, SAVES + 2):
            start_time = time.perf_counter()
            checkpoints.save(step, state, {}, None)
            checkpoints.wait()
            times.append(time.perf_counter() - start_time)
            start_time = time.perf_counter()
            items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
            plain.save(step, args=ocp.args.Composite(**items, data=ocp.args.JsonSave({})))
            plain.wait_until_finished()
            sync_files(plain_folder / str(step))
            plain_times.append(time.perf_counter() - start_time)
        plain.close()
        saved = checkpoints.folder / str(SAVES + 1)
        (saved / MANIFEST).unlink()
        checks = {"digests of arrays": lambda: digests(arrays), "sums of files": lambda: make_manifest(saved, {})}
        timings = {name: repeat(check, 0.0, min_repetitions=SAVES) for name, check in checks.items()}
        checkpoints.close()

    def step_once() -> None:
        nonlocal state
        state = bench.step(state)

    params = count_parameters(jax.eval_shape(lambda: state.params))
    step_timing = repeat(step_once, 0.0, min_repetitions=3, warmup=1)
    saves = Timing(tuple(times[1:])), Timing(tuple(plain_times[1:]))
    every_steps = bench.config.checkpoint.every_steps
    return SavingCost(params, num_bytes(arrays), *saves, timings, step_timing, every_steps)


def sync_files(folder: Path) -> None:
    """Until all below `folder` is on disk."""
    for name in files_below(folder):
        handle = os.open(folder / name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    sync_folders(folder)
