"""A run that goes on: what its workdir decided stays, and its length may change.

python launch/train.py --workdir=experiments/mine
python launch/train.py --workdir=experiments/mine --config.total_steps=4000
python launch/train.py --workdir=experiments/mine --config.minutes=10
"""

import dataclasses
import math
import statistics
from collections.abc import Collection
from pathlib import Path

from tale_jax.config import Config
from tale_jax.planning.autotune import TIME_MODEL, num_weights, with_choices
from tale_jax.runs.records import read_metrics
from tale_jax.training.checkpoint import SavedParams
from tale_jax.utils.format import format_duration


def resumed_config(config: Config, workdir: Path, overrides: Collection[str] = ()) -> tuple[Config, str]:
    """The settings with which the run in `workdir` goes on, and what is to be said about them ("": nothing).

    A run of minutes keeps what they decided. Other minutes than it was made for change its length: by the steps that
    the time between the two takes, at the speed that the run had so far.

    Args:
      config: of the command, of a recipe or of the workdir.
      workdir: with a config.json in it.
      overrides: dotted names of the settings that the command gave.

    Raises:
      ValueError: one line, for minutes of a run that was not made for any, or that are over before its last step.
    """
    saved, note = Config.load(workdir), ""
    length_changes = config.total_steps != saved.total_steps
    if config.minutes and not saved.minutes:
        steps = saved.total_steps + steps_within(saved, workdir, 60 * config.minutes)
        raise ValueError(
            f"minutes={config.minutes:g} must be 0 to go on with the experiment in {workdir}, whose length was given "
            f"in steps; for about {format_duration(60 * config.minutes)} more set --config.total_steps={steps} instead"
        )
    if config.minutes:
        config = with_choices(config, saved, overrides)
        length_changes = config.total_steps != saved.total_steps
        if config.minutes != saved.minutes and "total_steps" not in overrides:
            config, note = _with_other_minutes(config, saved, workdir)
            length_changes = True
    kept_warmup = config.schedule.warmup_steps == saved.schedule.warmup_steps
    if length_changes and kept_warmup and saved.has_default_warmup and "schedule.warmup_steps" not in overrides:
        config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, warmup_steps=0))
    return config, note


def steps_within(config: Config, workdir: Path, seconds: float | int) -> int:
    """How many steps of the run in `workdir` fit into the time, with their share of evaluations and checkpoints."""
    rates = [r["tokens_per_second"] for r in read_metrics(workdir).get("train", ()) if r.get("tokens_per_second")]
    if rates:
        step_seconds = config.tokens_per_step / statistics.median(rates[-100:])
    else:  # as its minutes were planned
        step_seconds = 60 * config.minutes / max(1, config.total_steps)
    scored_steps = config.evaluate.max_windows * config.model.seq_len / config.tokens_per_step
    stop_seconds = TIME_MODEL.scoring * scored_steps * step_seconds
    stop_seconds += TIME_MODEL.saving_seconds_per_weight * num_weights(config)
    if config.evaluate.every_steps:
        step_seconds += stop_seconds / config.evaluate.every_steps
    return int(seconds / max(1e-9, step_seconds * (1 + TIME_MODEL.margin)))


def _with_other_minutes(config: Config, saved: Config, workdir: Path) -> tuple[Config, str]:
    difference = 60 * (config.minutes - saved.minutes)
    if difference > 0:  # this start takes its time, too
        startup_seconds = TIME_MODEL.startup_seconds + (1 + TIME_MODEL.other_programs) * TIME_MODEL.compile_seconds
        steps = saved.total_steps + steps_within(saved, workdir, max(0.0, difference - startup_seconds))
    else:
        steps = saved.total_steps - steps_within(saved, workdir, -difference)
    if steps <= (done := max(SavedParams(workdir).steps, default=0)) and steps != saved.total_steps:
        enough = math.ceil(saved.minutes * max(1.0, done / saved.total_steps)) + 1
        raise ValueError(
            f"minutes={config.minutes:g} must leave steps to take, but the experiment in {workdir} has taken {done} "
            f"of its {saved.total_steps} within minutes={saved.minutes:g}; try --config.minutes={enough}, or leave it "
            "out to go on as planned"
        )
    note = f"minutes {saved.minutes:g} → {config.minutes:g}: {steps:,} steps in place of {saved.total_steps:,}"
    return dataclasses.replace(config, total_steps=steps), note
