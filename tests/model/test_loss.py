"""The head in chunks against the plain one: the same nats and gradients; and which tokens count."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tale_jax.model.loss import Head, cross_entropy, logits, loss_mask, weighted_cross_entropy

B, T, D, V = 3, 13, 16, 40


class InChunks(Head):
    """Few logits at once, so that the positions of this test fall into chunks."""

    chunk_logits = B * V * 5


def inputs(tied: bool):
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    x = jax.random.normal(keys[0], (B, T, D))
    table = jax.random.normal(keys[1], (V, D) if tied else (D, V))
    return x, table, jax.random.randint(keys[2], (B, T), 0, V), jax.random.uniform(keys[3], (B, T))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("materialize_transposes", [False, True])
@pytest.mark.parametrize("kind", [Head, InChunks])
def test_losses_and_gradients_are_those_of_optax(tied, materialize_transposes, kind):
    head = kind(tied, materialize_transposes)
    x, table, targets, weights = inputs(tied)

    def plain(x, table):
        return optax.losses.softmax_cross_entropy_with_integer_labels(x @ (table.T if tied else table), targets)

    np.testing.assert_allclose(cross_entropy(x, table, targets, head), plain(x, table), rtol=1e-5, atol=1e-5)
    scale = 0.5  # the gradient of the loss itself is not always 1
    mine = jax.value_and_grad(lambda *a: scale * weighted_cross_entropy(*a, targets, weights, head), (0, 1))(x, table)
    known = jax.value_and_grad(lambda *a: scale * jnp.sum(weights * plain(*a)), (0, 1))(x, table)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mine, known)
    np.testing.assert_allclose(weighted_cross_entropy(x, table, targets, weights, head), known[0] / scale, rtol=1e-5)


def test_weights_of_tokens_get_no_gradient():
    x, table, targets, weights = inputs(tied=True)
    grads = jax.grad(weighted_cross_entropy, (0, 3))(x, table, targets, weights, Head(True))
    assert jnp.any(grads[0] != 0) and jnp.all(grads[1] == 0)


def test_logits_of_both_kinds_of_head():
    for tied in (True, False):
        x, table, *_ = inputs(tied)
        np.testing.assert_allclose(logits(x, table, Head(tied)), x @ (table.T if tied else table), atol=1e-5)


def test_large_logits_stay_finite():
    x, table, targets, weights = inputs(tied=True)
    loss, grads = jax.value_and_grad(weighted_cross_entropy, (0, 1))(1e4 * x, table, targets, weights, Head(True))
    assert jnp.isfinite(loss) and all(bool(jnp.isfinite(g).all()) for g in grads)


def test_bfloat16_keeps_the_gradient_of_the_table_in_float32():
    x, table, targets, weights = inputs(tied=True)
    wide = jax.grad(weighted_cross_entropy, 1)(x, table, targets, weights, Head(True))
    narrow = jax.grad(weighted_cross_entropy, 1)(x.astype(jnp.bfloat16), table, targets, weights, InChunks(True, True))
    assert narrow.dtype == jnp.float32
    assert jnp.abs(narrow - wide).max() < 0.03 * jnp.abs(wide).max()


def test_no_array_of_all_logits_is_made():
    """In the whole training program the largest array with an axis V has no more rows than one chunk."""
    x, table, targets, weights = inputs(tied=False)
    program = jax.jit(jax.grad(weighted_cross_entropy, (0, 1)), static_argnums=4)
    text = program.lower(x, table, targets, weights, InChunks(False)).as_text()
    assert f"{B}x5x{V}x" in text and f"{B}x{T}x{V}x" not in text
    assert f"{B}x{T}x{V}x" in program.lower(x, table, targets, weights, Head(False)).as_text()


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_every_target_counts_but_bos(kind):
    np.testing.assert_array_equal(
        loss_mask(kind([[1, 5, 2], [0, 1, 3]]), 1), [[False, True, True], [True, False, True]]
    )
