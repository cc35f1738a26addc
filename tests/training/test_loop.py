"""The loop by itself, with a trainer that only counts: what is called when, and with what."""

import jax.numpy as jnp
import numpy as np
import pytest

from tale_jax.training.loop import Hooks, fit
from tale_jax.training.state import TrainState
from tale_jax.training.step import Trainer


def state_of(step: int) -> TrainState:
    return TrainState(step=step, params={}, opt_state=(), key=jnp.zeros(2, jnp.uint32))


class CountingTrainer(Trainer):
    """Notes its steps in `events`; the loss of a step is what stands in its windows."""

    def __init__(self, events):
        self.events = events

    def place(self, windows):
        self.events.append(f"place {windows[0, 0]}")
        return jnp.asarray(windows)

    def step(self, state, windows):
        self.events.append(f"step {state.step + 1}")
        return state.replace(step=state.step + 1), {"loss": windows[0, 0].astype(jnp.float32)}


class NotingHooks(Hooks):
    """Notes what it is told in `events`; wants states after the steps in `due`, and stops after `last` steps."""

    def __init__(self, events, due=(), last=1000):
        self.events, self.due, self.last = events, due, last

    def should_stop(self):
        return sum(event.startswith("step") for event in self.events) >= self.last

    def is_due(self, step):
        return step in self.due

    def on_metrics(self, step, metrics):
        assert type(metrics["loss"]) is float
        self.events.append(f"metrics {step}: {metrics['loss']:g}")

    def on_state(self, step, state):
        assert state.step == step
        self.events.append(f"state {step}")


def batches(count, events=None):
    for number in range(10, 10 + count):
        if events is not None:
            events.append(f"read {number}")
        yield np.full((2, 3), number, np.int32)


def test_metrics_are_told_one_step_late():
    """So that the next step is dispatched before anything waits for the one before."""
    events = []
    state, step = fit(CountingTrainer(events), state_of(0), batches(3), NotingHooks(events))
    assert events == [
        "place 10", "step 1",
        "place 11", "step 2", "metrics 1: 10",
        "place 12", "step 3", "metrics 2: 11",
        "metrics 3: 12",
    ]  # fmt: skip
    assert step == state.step == 3


def test_a_state_that_is_due_comes_after_its_own_metrics_which_are_told_once():
    events = []
    fit(CountingTrainer(events), state_of(0), batches(3), NotingHooks(events, due=(2, 3)))
    assert events == [
        "place 10", "step 1",
        "place 11", "step 2", "metrics 1: 10", "metrics 2: 11", "state 2",
        "place 12", "step 3", "metrics 3: 12", "state 3",
    ]  # fmt: skip


def test_a_loop_that_goes_on_counts_from_the_steps_before():
    events = []
    state, step = fit(CountingTrainer(events), state_of(7), batches(2), NotingHooks(events, due=(9,)), step=7)
    assert [event for event in events if not event.startswith("place")] == [
        "step 8", "step 9", "metrics 8: 10", "metrics 9: 11", "state 9"
    ]  # fmt: skip
    assert step == state.step == 9


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_stop_is_heeded_before_the_next_batch_is_read(last):
    """What was read and not trained on would be lost to the run that goes on; the metrics under way are not."""
    events = []
    _, step = fit(CountingTrainer(events), state_of(0), batches(5, events), NotingHooks(events, last=last))
    assert step == last
    assert [event for event in events if event.startswith("read")] == ["read 10", "read 11"][:last]
    assert [event for event in events if event.startswith("metrics")] == ["metrics 1: 10", "metrics 2: 11"][:last]


def test_without_batches_nothing_happens():
    events = []
    state = state_of(4)
    assert fit(CountingTrainer(events), state, [], NotingHooks(events), step=4) == (state, 4)
    assert not events


def test_plain_hooks_ask_for_nothing():
    hooks = Hooks()
    assert not hooks.should_stop() and not hooks.is_due(1)
    assert fit(CountingTrainer([]), state_of(0), batches(2), hooks)[1] == 2
