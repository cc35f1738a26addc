"""Compares plans with what runs really take: all programs of a run, in a process of its own.

python launch/plan.py --config=configs/m2_air.py --table
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.box
import rich.table

from tale_jax.config import Config, change
from tale_jax.hardware import machine
from tale_jax.hardware.backend import matmul_peak, start_backend
from tale_jax.planning.numerics import choose_precision
from tale_jax.planning.plan import make_mac_plan, make_plan, plan_run, print_plan, zeros
from tale_jax.planning.programs import UntrainedTokenizer, programs
from tale_jax.planning.timing import random_windows, time_steps, timed_step
from tale_jax.training.checkpoint import Checkpoints, max_concurrent_bytes
from tale_jax.training.step import make_trainer
from tale_jax.utils.files import json_line
from tale_jax.utils.format import format_bytes
from tale_jax.utils.progress import Progress
from tale_jax.utils.streams import table_console
from tale_jax.utils.subprocesses import run_module

NUM_STEPS = 12
CHECKPOINT_STEPS = (6, 9)


def calibrate(config: Config, platform: str) -> dict[str, Any]:
    """Predicted and measured memory and time of a run: `predicted_bytes`, `measured_bytes`, `predicted_step` and
    `measured_step` (seconds), or `error`.

    Another process takes twelve steps, with scoring, decoding and two checkpoints between them.
    """
    values = json.dumps(dataclasses.asdict(config))
    with Progress("calibrating: twelve steps in another process"):
        result = run_module("tale_jax.planning.calibrate", platform, stdin=values)
    return {"error": f"ended with {result.reason}"} if result.reason else result.json()


def _calibrate_in_this_process(config: Config, platform: str) -> dict[str, Any]:
    backend = start_backend(platform)
    dtype, reason = choose_precision(backend, config.precision)
    matmul_peak(dtype)
    trainer = make_trainer(config, backend, dtype, UntrainedTokenizer.bos_id)
    plan = plan_run(config, trainer, trainer.compile(), backend, 0, reason)
    predicted = time_steps(config, trainer)
    state, windows = trainer.init(), trainer.place(random_windows(config))
    functions = programs(config, trainer)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        throttle = max_concurrent_bytes(trainer.abstract_state, backend.overlap_io)
        checkpoints = Checkpoints(Path(folder), config.checkpoint.keep, throttle)
        machine.release_memory()
        for step in range(1, NUM_STEPS + 1):
            state, _, step_seconds = timed_step(trainer, state, windows)
            seconds.append(step_seconds)
            if step in CHECKPOINT_STEPS:
                for name in ("score", "prefill", "decode"):
                    call = functions[name]
                    jax.block_until_ready(call.function(*zeros(call.args), **call.kwargs))
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


def calibration_configs(config: Config) -> dict[str, Config]:
    """Twelve runs around a config, by name: remat × precision × batch, and a smaller model."""
    half = {"model.embed_dim": config.model.embed_dim // 2, "model.num_heads": config.model.num_heads // 2 or 1}
    half |= {"model.num_kv_heads": 0, "model.head_dim": 0, "model.mlp_dim": 0}
    configs = {}
    for size, shape in (("whole", {}), ("half", half)):
        for remat in ("none", "block"):
            for precision in ("float32", "bfloat16"):
                for batch in (8, 16) if size == "whole" else (16,):
                    settings = {"remat": remat, "precision": precision, "batch_size": batch, "micro_batch_size": batch}
                    settings |= {"model.scan_layers": remat == "block"}
                    configs[f"{size}, remat {remat}, {precision}, batch {batch}"] = change(config, shape | settings)
    return configs


def tell_plan(
    config: Config, workdir: Path | None, memory: int, mac: bool, time: bool, measure: bool, as_json: bool
) -> None:
    """Prints the plan of a run as tables or as one JSON object; with `measure` the run is calibrated beside it.

    Args:
      memory: bytes; 0: what this machine has.
      mac: plan for the GPU of a Mac, on whatever machine this is; else for this one, where `time` times a few steps.
    """
    backend = start_backend(config.backend.platform)
    given = config, backend, workdir, memory
    plan = make_mac_plan(*given) if mac else make_plan(*given, time)
    if not as_json:
        print_plan(plan)
    calibration = {}
    if measure:
        calibration = {"calibration": calibrate(config, backend.platform)}
        print_calibrations({"this run": calibration["calibration"]})
    if as_json:
        print(json_line(dataclasses.asdict(plan) | calibration))


def tell_calibrations(config: Config) -> None:
    """Calibrates runs around one on this machine, and prints the results."""
    platform = start_backend(config.backend.platform).platform
    print_calibrations({name: calibrate(run, platform) for name, run in calibration_configs(config).items()})


def print_calibrations(calibrations: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints planned beside measured memory and time, a row for each calibration."""
    table = rich.table.Table(box=rich.box.SIMPLE, title="Plan against calibration", title_justify="left")
    table.add_column("run")
    for title in ("peak, planned", "measured", "off by", "step, planned", "measured", "off by"):
        table.add_column(title, justify="right")
    for name, row in calibrations.items():
        if "error" in row:
            table.add_row(name, row["error"])
            continue
        errors = [row[f"predicted_{what}"] / row[f"measured_{what}"] - 1 for what in ("bytes", "step")]
        table.add_row(
            name,
            format_bytes(row["predicted_bytes"]),
            format_bytes(row["measured_bytes"]),
            f"{errors[0]:+.1%}",
            f"{row['predicted_step']:.3f} s",
            f"{row['measured_step']:.3f} s",
            f"{errors[1]:+.1%}",
        )
    table_console().print(table)


if __name__ == "__main__":
    print(json.dumps(_calibrate_in_this_process(Config.build(json.load(sys.stdin)).with_total_steps(), sys.argv[1])))
