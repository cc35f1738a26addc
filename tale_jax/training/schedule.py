"""What changes over a run: the learning rate, by warmup and decay, the length of its windows, the size of its batches.

A run is counted in steps: a step takes one batch of `batch_size` windows. Where batches are small a step takes its
batch in parts, with an update of the weights for each; everywhere else a step is one update.
"""

import itertools
from typing import Any

import jax.numpy as jnp
import optax

from tale_jax.config import OptimizerConfig, ScheduleConfig


def learning_rate(schedule: ScheduleConfig, optimizer: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Update (counted from 0) → learning rate of the matrices, by `schedule.name`; the last of warmup has the peak.

    linear and cosine fall from there to `final_fraction` of the peak at `total_steps`; wsd stays at the peak and falls
    linearly over the last `decay_fraction` of the run (Hu et al. 2024). The rate follows the text read: the updates of
    one step share out what changes from step to step. `schedule` is a planned one (no zero warmup).
    """
    peak, warmup = optimizer.learning_rate, schedule.warmup_steps
    final = peak * schedule.final_fraction
    rest = max(1, total_steps - warmup)
    if schedule.name == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif schedule.name == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=schedule.final_fraction)
    else:
        decay = min(rest, max(1, round(schedule.decay_fraction * total_steps)))
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)], [rest - decay]
        )
    # The first step has rate peak/warmup rather than 0, so that no step is lost.
    ramp = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    by_step = optax.join_schedules([ramp, after], [warmup])
    small, parts = _small_steps(schedule, total_steps), schedule.small_divisor
    if not small:
        return by_step

    def by_update(update: Any) -> Any:
        return by_step(jnp.where(update < small * parts, update / parts, update - small * (parts - 1)))

    return by_update


def window_cut(schedule: ScheduleConfig, total_steps: int, step: int) -> int:
    """How many pieces the windows of a step (counted from 0) are cut into: `short_cut` at first, then 1.

    What a model learns first it learns from near tokens, and short windows spare it the attention to far ones (Press et
    al. 2021, Shortformer).
    """
    return schedule.short_cut if step < round(schedule.short_fraction * total_steps) else 1


def batch_parts(schedule: ScheduleConfig, total_steps: int, step: int) -> int:
    """In how many parts a step (counted from 0) takes its batch: `small_divisor` at first, then 1.

    While the loss falls fast, gradients of few tokens say nearly as much as those of many, and allow more updates
    (McCandlish et al. 2018); later they are noise.
    """
    return schedule.small_divisor if step < _small_steps(schedule, total_steps) else 1


def phases(schedule: ScheduleConfig) -> list[tuple[float, int, int]]:
    """The kinds of steps of a run, in order: their share of it, `window_cut` and `batch_parts`."""
    edges, fine = sorted({0.0, schedule.short_fraction, schedule.small_fraction, 1.0}), 1 << 20
    starts = [(begin, end, round(begin * fine)) for begin, end in itertools.pairwise(edges)]
    return [
        (end - begin, window_cut(schedule, fine, step), batch_parts(schedule, fine, step))
        for begin, end, step in starts
    ]


def _small_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    return round(schedule.small_fraction * total_steps)
