"""Plans against what runs take: every program of a run, run once in a process of its own.

python launch/plan.py --config=configs/m2_air.py --table
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.box
import rich.console
import rich.table

from tale_jax.config import Config, change
from tale_jax.hardware import machine
from tale_jax.hardware.backend import matmul_peak, start_backend
from tale_jax.planning.numerics import choose_precision
from tale_jax.planning.plan import plan_run, random_windows, time_steps, zeros
from tale_jax.planning.programs import Untrained, programs
from tale_jax.training.checkpoint import Checkpoints, max_concurrent_bytes
from tale_jax.training.step import make_trainer
from tale_jax.utils.format import format_bytes
from tale_jax.utils.subprocesses import run_module


def calibrate(config: Config, platform: str) -> dict[str, Any]:
    """Runs every program of a run in a process of its own; returns what was predicted and what it took.

    Steps, scoring, decoding and two checkpoints. `predicted_bytes` and `predicted_step` come from the plan,
    `measured_bytes` and `measured_step` (the median of twelve) from the run.
    """
    values = json.dumps(dataclasses.asdict(config))
    answer = run_module("tale_jax.planning.calibrate", platform, stdin=values)
    return {"error": f"ended with {answer.reason}"} if answer.reason else answer.json()


def _calibrate_here(config: Config, platform: str) -> dict[str, Any]:
    backend = start_backend(platform)
    dtype, reason = choose_precision(backend, config.precision)
    matmul_peak(dtype)
    trainer = make_trainer(config, backend, dtype, Untrained.bos_id)
    plan = plan_run(config, trainer, trainer.compile(), backend, 0, reason)
    predicted = time_steps(config, trainer)
    state, windows = trainer.init(), trainer.place(random_windows(config))
    functions = programs(config, trainer)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        throttle = max_concurrent_bytes(trainer.abstract_state, backend.overlap_io)
        checkpoints = Checkpoints(Path(folder), config.checkpoint.keep, throttle)
        machine.release_memory()
        for step in range(1, 13):
            start_time = time.perf_counter()
            state, metrics = trainer.step(state, windows)
            float(metrics["loss"])
            seconds.append(time.perf_counter() - start_time)
            if step in (6, 9):
                for name in ("score", "prefill", "decode"):
                    function, args, kwargs = functions[name]
                    jax.block_until_ready(function(*zeros(args), **kwargs))
                checkpoints.save(step, state, {"examples": step}, None)
                machine.release_memory()
        checkpoints.close()
    return {
        "predicted_bytes": plan.peak_bytes,
        "measured_bytes": machine.peak_resident_memory(),
        "memory": dataclasses.asdict(plan.memory),
        "predicted_step": predicted,
        "measured_step": float(np.median(seconds)),
    }


def variants(config: Config) -> dict[str, Config]:
    """Twelve runs around a config, by name: remat × precision × batch, and a smaller model."""
    small = {"model.embed_dim": config.model.embed_dim // 2, "model.num_heads": config.model.num_heads // 2 or 1}
    small |= {"model.num_kv_heads": 0, "model.mlp_dim": 0}
    found = {}
    for size, shape in (("whole", {}), ("half", small)):
        for remat in ("none", "block"):
            for precision in ("float32", "bfloat16"):
                for batch in (8, 16) if size == "whole" else (16,):
                    settings = {"remat": remat, "precision": precision, "batch_size": batch, "micro_batch_size": batch}
                    settings |= {"model.scan_layers": remat == "block"}
                    found[f"{size}, remat {remat}, {precision}, batch {batch}"] = change(config, shape | settings)
    return found


def print_calibrations(calibrations: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints what was planned against what it took, a row for each calibration."""
    table = rich.table.Table(box=rich.box.SIMPLE, title="Plan against calibration", title_justify="left")
    table.add_column("run")
    for title in ("peak, planned", "measured", "off by", "step, planned", "measured", "off by"):
        table.add_column(title, justify="right")
    for name, r in calibrations.items():
        if "error" in r:
            table.add_row(name, r["error"])
            continue
        off = [r[f"predicted_{what}"] / r[f"measured_{what}"] - 1 for what in ("bytes", "step")]
        table.add_row(
            name,
            format_bytes(r["predicted_bytes"]),
            format_bytes(r["measured_bytes"]),
            f"{off[0]:+.1%}",
            f"{r['predicted_step']:.3f} s",
            f"{r['measured_step']:.3f} s",
            f"{off[1]:+.1%}",
        )
    rich.console.Console(highlight=False).print(table)


if __name__ == "__main__":
    print(json.dumps(_calibrate_here(Config.build(json.load(sys.stdin)).with_total_steps(), sys.argv[1])))
