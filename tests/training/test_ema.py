"""The moving average against a loop, and means of saved weights."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_trees_close, tiny_batches, tiny_trainer

from tale_jax.training.checkpoint import mean_of_trees
from tale_jax.training.ema import update_ema


def decay_of(step: int, decay: float) -> float:
    return min(decay, (1 + step) / (10 + step))


def test_the_average_equals_a_loop():
    rng = np.random.default_rng(0)
    path = rng.standard_normal((40, 3))
    found, wanted = {"a": jnp.asarray(path[0], jnp.float32)}, path[0]
    for step, weights in enumerate(path[1:]):
        found = update_ema(found, {"a": jnp.asarray(weights, jnp.float32)}, 0.7, jnp.int32(step))
        wanted = decay_of(step, 0.7) * wanted + (1 - decay_of(step, 0.7)) * weights
        np.testing.assert_allclose(found["a"], wanted, rtol=1e-5)


def test_a_mean_of_one_is_itself_and_of_more_the_mean():
    trees = [{"a": jnp.arange(3.0) + n} for n in range(4)]
    np.testing.assert_array_equal(mean_of_trees(iter(trees[:1]))["a"], trees[0]["a"])
    np.testing.assert_allclose(mean_of_trees(iter(trees))["a"], [1.5, 2.5, 3.5])


def test_a_run_keeps_the_average_of_its_weights():
    """Of those after each step, by the decay of its config, which few steps of the beginning are below."""
    decay = 0.3
    trainer = tiny_trainer(donate=True, **{"ema.decay": decay, "optimizer.learning_rate": 1e-2})
    state = trainer.init()
    wanted = jax.tree_util.tree_map(lambda x: np.array(x, np.float64), state.params)
    for step, windows in enumerate(tiny_batches(6)):
        state, _ = trainer.step(state, trainer.place(windows))
        kept = decay_of(step, decay)
        wanted = jax.tree_util.tree_map(lambda a, p, k=kept: k * a + (1 - k) * np.asarray(p), wanted, state.params)
    assert_trees_close(state.ema_params, wanted, rtol=1e-4, atol=1e-6)
