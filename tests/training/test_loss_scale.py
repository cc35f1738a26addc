"""float16: the loss is scaled so that gradients are numbers, and steps that overflow all the same change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import leaves_equal
from test_training import batches, losses, make_trainer

from tale_jax.training import loss_scale as scaling
from tale_jax.training.checkpoint import Checkpoints


def scale(value: float, good: int = 0) -> scaling.LossScale:
    return scaling.LossScale(jnp.asarray(value, jnp.float32), jnp.asarray(good, jnp.int32))


def test_only_float16_carries_a_scale():
    assert (
        scaling.needs_scale(jnp.float16)
        and not scaling.needs_scale(jnp.bfloat16)
        and not scaling.needs_scale(jnp.float32)
    )
    assert make_trainer().init().scale is None
    assert float(make_trainer(dtype=jnp.float16).init().scale.value) == scaling.FIRST


@pytest.mark.parametrize("micro", [0, 2])
def test_float16_learns_like_float32(micro):
    settings = {"optimizer.learning_rate": 1e-3, "micro_batch_size": micro}
    half = losses(make_trainer(dtype=jnp.float16, **settings), 10)
    np.testing.assert_allclose(half, losses(make_trainer(**settings), 10), rtol=2e-3)


def test_gradients_too_small_for_float16_survive_by_the_scale():
    """Gradients of this small model become small enough only by a scale far below 1."""
    windows = batches(1)[0]
    wanted = float(make_trainer().step(make_trainer().init(), windows)[1]["grad_norm"])
    trainer = make_trainer(dtype=jnp.float16)
    kept, lost = (
        abs(float(trainer.step(trainer.init().replace(scale=scale(value)), windows)[1]["grad_norm"]) / wanted - 1)
        for value in (scaling.FIRST, 2.0**-16)
    )
    assert kept < 1e-3 and lost > 0.1


def test_a_step_that_overflows_changes_only_the_scale():
    trainer = make_trainer(dtype=jnp.float16)
    state = trainer.init().replace(scale=scale(2.0**40, 7))
    after, metrics = trainer.step(state, batches(1)[0])
    leaves_equal((after.params, after.opt_state), (state.params, state.opt_state))
    assert int(after.step) == 1 and np.isfinite(float(metrics["loss"]))
    assert (float(after.scale.value), int(after.scale.good)) == (2.0**39, 0)


def test_the_scale_grows_after_a_run_of_good_steps_and_stays_in_its_bounds():
    good, bad = jnp.asarray(True), jnp.asarray(False)
    grown = scaling.next_scale(scale(8.0, scaling.PATIENCE - 1), good)
    assert (float(grown.value), int(grown.good)) == (16.0, 0)
    assert int(scaling.next_scale(scale(8.0, 3), good).good) == 4
    assert float(scaling.next_scale(scale(scaling.MOST, scaling.PATIENCE), good).value) == scaling.MOST
    assert float(scaling.next_scale(scale(scaling.LEAST), bad).value) == scaling.LEAST


def test_the_scale_comes_back_from_a_checkpoint_and_begins_anew_where_there_was_none(tmp_path):
    half, single = make_trainer(dtype=jnp.float16), make_trainer()
    for name, trainer, saved in (("half", half, scale(4.0, 9)), ("single", single, None)):
        checkpoints = Checkpoints(tmp_path / name, 1)
        checkpoints.save(1, trainer.init().replace(scale=saved), {"examples": 8}, None)
        checkpoints.close()

    def restored(name, trainer):
        found, _ = Checkpoints(tmp_path / name, 1).restore(trainer.abstract_state, trainer.state_shardings)
        return found.scale if found.scale is None else tuple(map(float, jax.tree_util.tree_leaves(found.scale)))

    assert restored("half", half) == (4.0, 9.0)
    assert restored("single", half) == (scaling.FIRST, 0.0)
    assert restored("half", single) is None
