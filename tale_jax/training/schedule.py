"""What changes over a run: the learning rate, by warmup and decay, and the length of its windows.

A new schedule is one function and one entry in `SCHEDULES`, and its name in `SCHEDULES` of `config.py`.
"""

from collections.abc import Callable, Iterator

import numpy as np
import optax
from jaxtyping import Int32

from tale_jax.config import OptimizerConfig, ScheduleConfig
from tale_jax.data.loader import split_windows


def linear(config: ScheduleConfig, peak: float, steps: int, total_steps: int) -> optax.Schedule:
    """From the peak to `final_fraction` of it in a straight line."""
    del total_steps
    return optax.linear_schedule(peak, peak * config.final_fraction, steps)


def cosine(config: ScheduleConfig, peak: float, steps: int, total_steps: int) -> optax.Schedule:
    """From the peak to `final_fraction` of it along half a cosine (Loshchilov and Hutter 2017, without restarts)."""
    del total_steps
    return optax.cosine_decay_schedule(peak, steps, alpha=config.final_fraction)


def wsd(config: ScheduleConfig, peak: float, steps: int, total_steps: int) -> optax.Schedule:
    """Warmup, stable, decay (Hu et al. 2024): the peak, then over `decay_fraction` of the run a straight line."""
    decay = min(steps, max(1, round(config.decay_fraction * total_steps)))
    final = optax.linear_schedule(peak, peak * config.final_fraction, decay)
    return optax.join_schedules([optax.constant_schedule(peak), final], [steps - decay])


# Name → function of the config, the peak learning rate, the steps after warmup, and all steps of the run.
SCHEDULES: dict[str, Callable[[ScheduleConfig, float, int, int], optax.Schedule]] = {
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
}


def learning_rate(schedule: ScheduleConfig, optimizer: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Step (counted from 0) → learning rate of the matrices; the last step of the linear warmup has the peak.

    `schedule` is one of a config whose length is known, so that its warmup is not 0.
    """
    peak, warmup = optimizer.learning_rate, schedule.warmup_steps
    decay = SCHEDULES[schedule.name](schedule, peak, max(1, total_steps - warmup), total_steps)
    # The first step has the learning rate peak/warmup rather than 0, so that no step is lost.
    ramp = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, decay], [warmup])


def seq_len_divisor(schedule: ScheduleConfig, total_steps: int, step: int) -> int:
    """How many shorter windows each window of a step (counted from 0) is split into: 1 but for the first steps.

    What a model learns first it learns from near tokens, and short windows spare it the attention to far ones (Press et
    al. 2021, Shortformer).
    """
    return schedule.seq_len_divisor if step < round(schedule.short_seq_fraction * total_steps) else 1


def scheduled_batches(
    batches: Iterator[Int32[np.ndarray, "B T1"]], schedule: ScheduleConfig, total_steps: int, step: int
) -> Iterator[Int32[np.ndarray, "_ _"]]:
    """The batches from `step` (counted from 0) to the end of the run, in windows of the length that each step takes."""
    for current in range(step, total_steps):
        yield split_windows(next(batches), seq_len_divisor(schedule, total_steps, current))
