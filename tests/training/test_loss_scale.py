"""float16: the loss is scaled so that gradients are numbers, and steps that overflow all the same change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LIKE_SGD, assert_trees_equal, take_steps, tiny_batches, tiny_trainer

from tale_jax.training import loss_scale
from tale_jax.training.checkpoint import Checkpoints
from tale_jax.training.loss_scale import LossScale, needs_scale, next_scale
from tale_jax.training.step import global_norm


def scale(value: float | int, good: int = 0) -> LossScale:
    return LossScale(jnp.asarray(value, jnp.float32), jnp.asarray(good, jnp.int32))


def test_only_float16_needs_a_scale():
    assert needs_scale(jnp.float16) and not needs_scale(jnp.bfloat16) and not needs_scale(jnp.float32)
    assert tiny_trainer().init().scale is None
    assert float(tiny_trainer(dtype=jnp.float16).init().scale.value) == loss_scale.FIRST


@pytest.mark.parametrize("micro", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_float16_learns_like_float32(micro):
    """The scale is divided out of the loss, of the gradient's norm and of the update."""
    half, half_metrics = take_steps(tiny_trainer(dtype=jnp.float16, micro_batch_size=micro, **LIKE_SGD), 5)
    trainer = tiny_trainer(micro_batch_size=micro, **LIKE_SGD)
    single, metrics = take_steps(trainer, 5)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(half_metrics[name], metrics[name], rtol=5e-3)
    difference, moved = (
        global_norm(jax.tree_util.tree_map(jnp.subtract, params, single.params))
        for params in (half.params, trainer.init().params)
    )
    assert difference < 0.02 * moved
    np.testing.assert_array_equal(half_metrics["loss_scale"], loss_scale.FIRST)


def test_gradients_too_small_for_float16_survive_by_the_scale():
    """Gradients of this small model become small enough only by a scale far below 1."""
    trainer, single = tiny_trainer(dtype=jnp.float16), tiny_trainer()
    windows = trainer.place(tiny_batches(1)[0])
    wanted = float(single.step(single.init(), windows)[1]["grad_norm"])
    kept, lost = (
        abs(float(trainer.step(trainer.init().replace(scale=scale(value)), windows)[1]["grad_norm"]) / wanted - 1)
        for value in (loss_scale.FIRST, 2.0**-16)
    )
    assert kept < 1e-3 and lost > 0.1


def test_a_step_that_overflows_changes_only_the_scale():
    trainer = tiny_trainer(dtype=jnp.float16)
    state = trainer.init().replace(scale=scale(2.0**40, 7))
    after, metrics = trainer.step(state, trainer.place(tiny_batches(1)[0]))
    assert_trees_equal((after.params, after.opt_state), (state.params, state.opt_state))
    assert int(after.step) == 1 and np.isfinite(float(metrics["loss"]))
    assert (float(after.scale.value), int(after.scale.good)) == (2.0**39, 0)


def test_the_scale_grows_after_a_run_of_good_steps_and_stays_in_its_bounds():
    good, bad = jnp.asarray(True), jnp.asarray(False)
    grown = next_scale(scale(8.0, loss_scale.PATIENCE - 1), good)
    assert (float(grown.value), int(grown.good)) == (16.0, 0)
    same = next_scale(scale(8.0, 3), good)
    assert (float(same.value), int(same.good)) == (8.0, 4)
    halved = next_scale(scale(8.0, 3), bad)
    assert (float(halved.value), int(halved.good)) == (4.0, 0)
    assert float(next_scale(scale(loss_scale.MAX_SCALE, loss_scale.PATIENCE), good).value) == loss_scale.MAX_SCALE
    assert float(next_scale(scale(loss_scale.MIN_SCALE), bad).value) == loss_scale.MIN_SCALE


def test_the_scale_comes_back_from_a_checkpoint_and_starts_anew_where_there_was_none(tmp_path):
    half, single = tiny_trainer(dtype=jnp.float16), tiny_trainer()
    for name, trainer, saved in (("half", half, scale(4.0, 9)), ("single", single, None)):
        checkpoints = Checkpoints(tmp_path / name, 1)
        checkpoints.save(1, trainer.init().replace(scale=saved), {"examples": 8}, None)
        checkpoints.close()

    def restored(name, trainer):
        found, _ = Checkpoints(tmp_path / name, 1).restore(trainer.abstract_state, trainer.state_shardings)
        return found.scale if found.scale is None else tuple(map(float, jax.tree_util.tree_leaves(found.scale)))

    assert restored("half", half) == (4.0, 9.0)
    assert restored("single", half) == (loss_scale.FIRST, 0.0)
    assert restored("half", single) is None
