"""What changes over a run: the learning rate by warmup and decay, and the length of windows."""

import numpy as np
import pytest
from helpers import build_config

from tale_jax import config as config_module
from tale_jax.planning.timing import phases
from tale_jax.training.schedule import SCHEDULES, learning_rate, scheduled_batches, seq_len_divisor


def rates(total_steps, **changes) -> np.ndarray:
    """The learning rate of each step, over a peak of 1, and of the step after the last."""
    config = build_config(**{"optimizer.learning_rate": 1.0, **changes})
    rate = learning_rate(config.schedule, config.optimizer, total_steps)
    return np.array([float(rate(step)) for step in range(total_steps + 1)])


def test_every_schedule_that_a_config_may_name_is_there():
    assert tuple(SCHEDULES) == config_module.SCHEDULES


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_schedule_warms_up_peaks_and_ends(name, final):
    values = rates(100, **{"schedule.name": name, "schedule.warmup_steps": 10, "schedule.final_fraction": final})
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-5)
    assert values[100] == pytest.approx(final, abs=1e-6)
    assert (np.diff(values[9:]) <= 1e-9).all()
    rest = np.arange(10, 101)
    left = {
        "linear": 1 - (rest - 10) / 90,
        "cosine": (1 + np.cos(np.pi * (rest - 10) / 90)) / 2,
        "wsd": np.minimum(1, (100 - rest) / 20),
    }[name]
    np.testing.assert_allclose(values[10:], final + (1 - final) * left, rtol=1e-4, atol=1e-6)


def test_wsd_decays_over_its_share_of_the_run():
    changes = {"schedule.name": "wsd", "schedule.warmup_steps": 10, "schedule.decay_fraction": 0.5}
    values = rates(100, **changes)
    np.testing.assert_allclose(values[9:51], 1, rtol=1e-6)
    assert values[51] < 1 and values[75] == pytest.approx(0.5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_of_one_step_has_a_rate(name):
    config = build_config(total_steps=1, **{"schedule.name": name}).with_total_steps()
    assert float(learning_rate(config.schedule, config.optimizer, 1)(0)) == pytest.approx(
        config.optimizer.learning_rate
    )


SHORT = {"schedule.short_seq_fraction": 0.25, "schedule.seq_len_divisor": 4}


def test_short_windows_come_first_for_their_share_of_the_run():
    config = build_config(**SHORT)
    assert [seq_len_divisor(config.schedule, 8, step) for step in range(8)] == [4, 4, 1, 1, 1, 1, 1, 1]
    assert {seq_len_divisor(build_config().schedule, 8, step) for step in range(8)} == {1}


def test_phases_are_what_the_steps_are():
    assert phases(build_config().schedule) == [(1.0, 1)]
    assert phases(build_config(**SHORT | {"schedule.short_seq_fraction": 1.0}).schedule) == [(1.0, 4)]
    schedule = build_config(**SHORT).schedule
    assert phases(schedule) == [(0.25, 4), (0.75, 1)]
    divisors = [seq_len_divisor(schedule, 16, step) for step in range(16)]
    assert divisors == [divisor for share, divisor in phases(schedule) for _ in range(round(16 * share))]


@pytest.mark.parametrize("start", [0, 1, 2, 7])
def test_scheduled_batches_end_with_the_run_and_go_on_in_the_phase_of_their_step(start):
    schedule = build_config(**SHORT).schedule
    batches = (np.full((2, 17), step, np.int32) for step in range(start, 100))
    found = list(scheduled_batches(batches, schedule, 8, start))
    assert [int(batch[0, 0]) for batch in found] == list(range(start, 8))
    assert [batch.shape for batch in found] == [(8, 5) if step < 2 else (2, 17) for step in range(start, 8)]
