"""The loop, and nothing else: batches in, a trained state out; all that happens beside the steps is in the hooks.

The host never waits for the step it has just dispatched: metrics are read one step late.

    state = fit(trainer, trainer.init(), batches, Hooks())
"""

from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Array, Int32

from tale_jax.training.state import TrainState
from tale_jax.training.step import Trainer


class Hooks:
    """What happens beside the steps of a run; each does nothing here. Steps are counted from 1."""

    def should_stop(self) -> bool:
        """Asked before each step."""
        return False

    def is_due(self, step: int) -> bool:
        """Whether `on_state` is wanted after this step."""
        return False

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Host numbers of each step, while the next one computes."""

    def on_state(self, step: int, state: TrainState) -> None:
        """The state after a step that is due; its metrics have been told. The next step takes its memory."""


def fit(
    trainer: Trainer, state: TrainState, batches: Iterable[Int32[np.ndarray, "_ _"]], hooks: Hooks, step: int = 0
) -> tuple[TrainState, int]:
    """Takes a step for each batch, until there are no more or a hook says stop.

    Args:
      batches: token windows [B, T+1] of this process, as many as there are steps to take.
      step: steps taken before.

    Returns:
      the state, and the number of steps taken in all.
    """
    unread: dict[str, Array] | None = None
    batches = iter(batches)
    while not hooks.should_stop() and (windows := next(batches, None)) is not None:
        state, metrics = trainer.step(state, trainer.place(windows))
        if unread is not None:
            hooks.on_metrics(step, _on_host(unread))
        step, unread = step + 1, metrics
        if hooks.is_due(step):
            hooks.on_metrics(step, _on_host(unread))
            unread = None
            hooks.on_state(step, state)
    if unread is not None:
        hooks.on_metrics(step, _on_host(unread))
    return state, step


def _on_host(metrics: dict[str, Array]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
