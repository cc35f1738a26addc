"""How long a training step takes: a few real steps on random tokens, each waited for by reading its loss."""

import time
from typing import Any

import numpy as np
from jaxtyping import Array, Int32

from tale_jax.config import Config, ScheduleConfig
from tale_jax.data.loader import split_windows
from tale_jax.training.state import TrainState
from tale_jax.training.step import Trainer

NUM_STEPS = 4  # that are counted, after one that is not
NUM_SPECIAL_TOKENS = 4  # the first ids of a vocabulary: UNK, BOS, EOS and PAD


def phases(schedule: ScheduleConfig) -> list[tuple[float, int]]:
    """The kinds of steps of a run, in order: their share of it, and their `seq_len_divisor`."""
    short = schedule.short_seq_fraction
    found = [(short, schedule.seq_len_divisor), (1 - short, 1)]
    return [(share, divisor) for share, divisor in found if share]


def random_windows(config: Config) -> Int32[np.ndarray, "B T1"]:
    """A batch of windows of random tokens, always the same."""
    shape = (config.batch_size, config.model.seq_len + 1)
    tokens = np.random.default_rng(0).integers(NUM_SPECIAL_TOKENS, config.tokenizer.vocab_size, shape, dtype=np.int32)
    return tokens


def timed_step(trainer: Trainer, state: TrainState, windows: Array) -> tuple[TrainState, dict[str, Any], float]:
    """One training step: the new state, its metrics, and how many seconds it took."""
    start_time = time.perf_counter()
    state, metrics = trainer.step(state, windows)
    float(metrics["loss"])  # a host read: on some plugins nothing else waits
    return state, metrics, time.perf_counter() - start_time


def time_steps(config: Config, trainer: Trainer, num_steps: int = NUM_STEPS) -> float:
    """Seconds of a training step: the median of `num_steps`, after one that is not counted.

    The mean over the run, where it starts with shorter windows.
    """
    state, mean = trainer.init(), 0.0
    for share, divisor in phases(config.schedule):
        windows = trainer.place(split_windows(random_windows(config), divisor))
        seconds = []
        for _ in range(num_steps + 1):
            state, _, step_seconds = timed_step(trainer, state, windows)
            seconds.append(step_seconds)
        mean += share * float(np.median(seconds[1:]))
    return mean
