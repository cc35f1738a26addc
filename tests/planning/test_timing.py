"""How a step is timed: on a clock that the tests set."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_config

from tale_jax.planning import timing
from tale_jax.training.state import TrainState
from tale_jax.training.step import Trainer, make_trainer


class FakeTrainer(Trainer):
    """A trainer whose step on windows of so many tokens takes the next of the seconds given for that length."""

    def __init__(self, clock, seconds):
        self._clock, self._left = clock, {seq_len: iter(times) for seq_len, times in seconds.items()}
        self.init = lambda: TrainState(step=0, params=None, opt_state=None, key=None)

    def place(self, windows):
        return jnp.asarray(windows)

    def step(self, state, windows):
        self._clock.now += next(self._left[windows.shape[1] - 1])
        return state.replace(step=state.step + 1), {"loss": jnp.zeros(())}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the steps of a `FakeTrainer` move on."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_the_median_of_the_steps_after_the_first_counts(clock):
    config = build_config(**{"model.seq_len": 64})
    trainer = FakeTrainer(clock, {64: [100.0, 1.0, 2.0, 9.0, 3.0]})
    assert timing.time_steps(config, trainer) == 2.5
    trainer = FakeTrainer(clock, {64: [100.0, 1.0, 9.0]})
    assert timing.time_steps(config, trainer, num_steps=2) == 5.0


def test_the_time_of_a_step_is_the_mean_over_windows_of_each_length(clock):
    changes = {"model.seq_len": 64, "schedule.short_seq_fraction": 0.25, "schedule.seq_len_divisor": 4}
    trainer = FakeTrainer(clock, {16: [50.0, 3.0, 3.0, 3.0, 3.0], 64: [50.0, 8.0, 8.0, 8.0, 8.0]})
    assert timing.time_steps(build_config(**changes), trainer) == 0.25 * 3.0 + 0.75 * 8.0


def test_random_windows_are_a_batch_of_text_tokens_and_always_the_same():
    config = build_config(**{"model.seq_len": 64, "tokenizer.vocab_size": 512})
    windows = timing.random_windows(config)
    assert (windows.shape, windows.dtype) == ((4, 65), np.int32)
    assert windows.min() >= timing.NUM_SPECIAL_TOKENS and windows.max() < 512
    np.testing.assert_array_equal(windows, timing.random_windows(config))


def test_a_timed_step_is_a_step(cpu):
    config = build_config(precision="float32").with_total_steps()
    trainer = make_trainer(config, cpu, jnp.float32, 1)
    state, metrics, seconds = timing.timed_step(trainer, trainer.init(), trainer.place(timing.random_windows(config)))
    assert int(state.step) == 1 and jnp.isfinite(metrics["loss"]) and seconds > 0
