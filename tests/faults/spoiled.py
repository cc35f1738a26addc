"""Runs a launch script in which the loss of some steps, and so their gradients, is multiplied by a factor.

python tests/faults/spoiled.py 35,36:nan launch/train.py --config=… --workdir=…
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax.numpy as jnp

from tale_jax.training import step as step_module

make_train_step, token_losses = step_module.make_train_step, step_module.token_losses


def spoil(steps: list[int], factor: float) -> None:
    """From now on training steps of these numbers (the first is 1) have a loss that is multiplied by `factor`."""

    def make(*arguments):
        factors = []  # of the step that is traced
        step_module.token_losses = lambda *more: token_losses(*more) * factors[-1]
        train_step = make_train_step(*arguments)

        def spoiled_step(state, windows):
            factors.append(jnp.where(jnp.isin(state.step + 1, jnp.array(steps)), factor, 1.0))
            return train_step(state, windows)

        return spoiled_step

    step_module.make_train_step = make


if __name__ == "__main__":
    numbers, _, factor = sys.argv[1].partition(":")
    spoil([int(number) for number in numbers.split(",")], float(factor))
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
