"""The moving average against a loop, and means of saved weights."""

import jax
import jax.numpy as jnp
import numpy as np
from test_training import batches, make_trainer

from tale_jax.training.ema import update_ema


def test_the_average_equals_a_loop():
    rng = np.random.default_rng(0)
    path = rng.standard_normal((40, 3))
    average, wanted = {"a": jnp.asarray(path[0], jnp.float32)}, path[0]
    for step, weights in enumerate(path[1:]):
        average = update_ema(average, {"a": jnp.asarray(weights, jnp.float32)}, 0.7, jnp.int32(step))
        decay = min(0.7, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * weights
        np.testing.assert_allclose(average["a"], wanted, rtol=1e-5)


def test_a_mean_of_one_is_itself_and_of_more_the_mean():
    trees = [{"a": jnp.arange(3.0) + n} for n in range(4)]
    np.testing.assert_array_equal(mean(iter(trees[:1]))["a"], trees[0]["a"])
    np.testing.assert_allclose(mean(iter(trees))["a"], [1.5, 2.5, 3.5])


def test_a_run_keeps_the_average_of_its_weights_and_nothing_where_it_is_off():
    trainer = make_trainer(donate=True, **{"ema.decay": 0.9, "optimizer.learning_rate": 1e-2})
    state = trainer.init()
    np.testing.assert_array_equal(state.ema_params["embedding"], state.params["embedding"])
    wanted = np.array(state.params["embedding"], np.float64)
    for step, windows in enumerate(batches(6)):
        state, _ = trainer.step(state, trainer.place(windows))
        decay = min(0.9, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * np.array(state.params["embedding"])
    np.testing.assert_allclose(state.ema_params["embedding"], wanted, atol=1e-6)
    assert state.eval_params is state.ema_params
    off = make_trainer().init()
    assert off.ema_params is None and off.eval_params is off.params
    count = len(jax.tree_util.tree_leaves(off))
    assert len(jax.tree_util.tree_leaves(state)) == count + len(jax.tree_util.tree_leaves(state.params))
