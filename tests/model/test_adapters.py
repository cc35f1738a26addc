"""Updates change nothing until they have learned, count as if merged, and are all that is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BOS, assert_trees_equal, build_config, take_steps, tiny_batches, tiny_trainer

from tale_jax.model.adapters import Adapted, column_ratio, init_adapters, merged
from tale_jax.model.transformer import token_losses

LORA = {"lora.rank": 4, "optimizer.name": "adamw", "optimizer.learning_rate": 1e-2}
KINDS = {
    "lora": LORA,
    "dora": LORA | {"lora.dora": True, "model.zero_init_outputs": False},  # a column of 0 stays so
    "rslora, some": LORA | {"lora.rank_stabilized": True, "lora.matrices": "query, down"},
    "remat, scanned": LORA | {"remat": "block", "model.scan_layers": True},
}
WINDOWS = jnp.asarray(tiny_batches(1)[0])


def losses(trainer, weights) -> np.ndarray:
    return np.asarray(jax.jit(lambda w: token_losses(trainer.model, w, WINDOWS, BOS))(weights))


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k not in ("lora", "dora"))) for k in KINDS]
)
def test_updates_change_nothing_at_first_and_then_as_if_merged(kind):
    trainer = tiny_trainer(**KINDS[kind])
    first = trainer.init()
    np.testing.assert_array_equal(losses(trainer, first.eval_params), losses(trainer, first.base.base))
    assert_trees_equal(
        first.base.base, tiny_trainer(**KINDS[kind] | {"lora.rank": 0, "lora.dora": False}).init().params
    )
    before = jax.device_get(first)
    state, _ = take_steps(trainer, 5)
    assert_trees_equal(state.base.base, before.base.base)
    assert all((a != b).any() for a, b in zip(*map(jax.tree_util.tree_leaves, (state.params, before.params))))
    apart, together = losses(trainer, state.eval_params), losses(trainer, merged(state.eval_params))
    np.testing.assert_allclose(apart, together, atol=1e-5)
    assert np.abs(apart - losses(trainer, before.base.base)).max() > 1e-2


def test_only_chosen_matrices_have_updates():
    params = tiny_trainer(**LORA).init().base.base
    config = build_config(**LORA | {"lora.matrices": "query, down"}).lora
    tree = init_adapters(params, config, jax.random.PRNGKey(0))["blocks"]
    assert {module: set(part) for module, part in tree.items()} == {"attention": {"query"}, "mlp": {"down"}}


def test_the_gradient_is_that_of_the_merged_weights():
    """Of a loss of A and B through W + scale A B, by automatic differentiation."""
    trainer = tiny_trainer(**LORA)
    state, _ = take_steps(trainer, 3)

    def loss(adapters, through):
        weights = state.base.replace(adapters=adapters)
        return jnp.mean(token_losses(trainer.model, merged(weights) if through else weights, WINDOWS, BOS))

    apart, together = (jax.jit(jax.grad(loss), static_argnums=1)(state.params, way) for way in (False, True))
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), apart, together)


def test_sizes_of_columns_are_those_of_the_sum():
    rng = np.random.default_rng(0)
    kernel, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 8, 6), (2, 8, 3), (2, 3, 6)))
    kernel[:, :, 0] = 0  # a column that has no size to keep
    wanted = np.linalg.norm(kernel, axis=1)[:, 1:] / np.linalg.norm(kernel + 0.5 * a @ b, axis=1)[:, 1:]
    found = np.asarray(column_ratio(*map(jnp.asarray, (kernel, a, b)), 0.5))
    np.testing.assert_allclose(found[:, 1:], wanted, rtol=1e-5)
    np.testing.assert_array_equal(found[:, 0], 1)
    np.testing.assert_array_equal(column_ratio(*map(jnp.asarray, (kernel, a, 0 * b)), 0.5), np.ones((2, 6)))


def test_dropout_is_of_what_updates_read_and_of_training_alone():
    trainer = tiny_trainer(**LORA | {"lora.dropout": 0.5})
    state, _ = take_steps(trainer, 3)
    weights, key = state.eval_params, jax.random.PRNGKey(0)
    assert isinstance(weights, Adapted) and weights.dropout == 0.5
    dropping = jax.jit(lambda weights: token_losses(trainer.model, weights, WINDOWS, BOS, dropout_key=key))
    assert np.abs(dropping(weights) - losses(trainer, weights)).max() > 1e-4
    untouched = dropping(trainer.init().eval_params)
    np.testing.assert_array_equal(untouched, losses(trainer, trainer.init().base.base))


def test_a_rank_above_the_matrix_is_refused_with_one_that_fits():
    with pytest.raises(
        ValueError, match=r"lora.rank=40 must not exceed 32, .* key \[32, 32\]; try --config.lora.rank=32"
    ):
        tiny_trainer(**LORA | {"lora.rank": 40})
    tiny_trainer(**LORA | {"lora.rank": 32})
