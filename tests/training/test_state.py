"""The state before the first step is a function of the model and the seed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import assert_trees_equal, build_config, tiny_trainer

from tale_jax.model.initialization import with_induction_heads
from tale_jax.model.transformer import Transformer
from tale_jax.training.state import init_state


def first_state(seed=0, with_ema=False, dtype=jnp.float32, **changes):
    config = build_config(**{f"model.{name}": value for name, value in changes.items()}).model
    return init_state(Transformer(config, 64, dtype), optax.adam(0.1), seed, with_ema)


def test_weights_and_dropout_are_functions_of_the_seed():
    one, same, other = (first_state(seed) for seed in (0, 0, 1))
    assert_trees_equal(one, same)
    for field in ("params", "key"):
        pairs = zip(*(jax.tree_util.tree_leaves(getattr(state, field)) for state in (one, other)), strict=True)
        assert any((a != b).any() for a, b in pairs)
    assert int(one.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree_util.tree_leaves(one.opt_state))


def test_a_trainer_takes_the_seed_of_its_config():
    one, other = (tiny_trainer(seed=seed).init().params["embedding"] for seed in (0, 1))
    assert (one != other).any()


def test_induction_heads_are_written_where_the_config_asks_for_them():
    plain, induction = (first_state(induction_init=on).params for on in (False, True))
    config = build_config(**{"model.induction_init": True}).model
    assert_trees_equal(induction, with_induction_heads(plain, config))
    assert (induction["embedding"] != plain["embedding"]).any()


def test_a_moving_average_starts_from_the_first_weights():
    state = first_state(with_ema=True)
    assert_trees_equal(state.ema_params, state.params)
    assert state.eval_params is state.ema_params
    off = first_state()
    assert off.ema_params is None and off.eval_params is off.params


def test_only_float16_carries_a_loss_scale():
    assert first_state(dtype=jnp.float16).scale is not None
    assert first_state(dtype=jnp.bfloat16).scale is None and first_state().scale is None
