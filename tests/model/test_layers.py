"""Norm, gate, dropout and products against the plain formulas, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tale_jax.model.layers import dropout, matmul, matmul_transposed, rms_norm, split_heads, swiglu


@pytest.mark.parametrize("materialize_transposes", [False, True])
@pytest.mark.parametrize("shape", [(64, 24, 16), (64, 16, 24), (60, 24, 16)])  # fewer and more columns, an odd count
def test_products_have_the_gradients_of_automatic_differentiation(materialize_transposes, shape):
    rows, inner, columns = shape
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    x, dy = jax.random.normal(keys[0], (2, rows // 2, inner)), jax.random.normal(keys[1], (2, rows // 2, columns))
    for product, w, known in (
        (matmul, jax.random.normal(keys[2], (inner, columns)), lambda x, w: x @ w),
        (matmul_transposed, jax.random.normal(keys[3], (columns, inner)), lambda x, w: x @ w.T),
    ):
        y, pull = jax.vjp(lambda x, w, f=product: f(x, w, materialize_transposes), x, w)
        y2, pull2 = jax.vjp(known, x, w)
        for a, b in zip((y, *pull(dy)), (y2, *pull2(dy)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("materialize_transposes", [False, True])
@pytest.mark.parametrize("length", [16, 13])
def test_heads_are_split_as_a_reshape_splits_them(materialize_transposes, length):
    x, dy = jnp.arange(2.0 * length * 12).reshape(2, length, 12), jnp.ones((2, 3, length, 4))
    y, pull = jax.vjp(lambda x: split_heads(x, 3, materialize_transposes), x)
    known, pull_known = jax.vjp(lambda x: jnp.moveaxis(x.reshape(2, length, 3, 4), 2, 1), x)
    np.testing.assert_array_equal(y, known)
    np.testing.assert_array_equal(pull(dy * y)[0], pull_known(dy * y)[0])


@pytest.mark.parametrize(("rate", "taken"), [(0.1, 26 / 256), (0.5, 0.5), (1e-9, 1 / 256), (0.9999, 255 / 256)])
@pytest.mark.parametrize("width", [64, 30])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate, taken, width):
    x = jnp.ones((64, 256, width), jnp.bfloat16)
    y = np.asarray(dropout(x, rate, jax.random.PRNGKey(0)).astype(jnp.float32))
    np.testing.assert_allclose((y == 0).mean(), taken, atol=4 * (taken * (1 - taken) / y.size) ** 0.5)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - taken), rtol=0.005)
    if rate == 0.5:
        columns = (y == 0).reshape(-1, width)
        pairs = np.corrcoef(columns.T) - np.eye(width)  # bytes of a word, and words, are independent
        assert np.abs(pairs).max() < 6 / len(columns) ** 0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("mine", "plain"),
    [
        (
            lambda x, y: rms_norm(x, 1 + y[0], 1e-5),
            lambda x, y: (1 + y[0]) * x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5),
        ),
        (swiglu, lambda gate, up: gate * jax.nn.sigmoid(gate) * up),
    ],
    ids=["rms_norm", "swiglu"],
)
def test_gradients_written_by_hand_are_those_of_automatic_differentiation(mine, plain, dtype):
    x, y, dy = jax.random.normal(jax.random.PRNGKey(0), (3, 5, 24)).astype(dtype)
    value, pull = jax.vjp(mine, x, y)
    expected, pull_plain = jax.vjp(plain, *(a.astype(jnp.float32) for a in (x, y)))
    tolerance = 1e-6 if dtype == jnp.float32 else 3e-2
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)
    for found, wanted in zip(pull(dy), pull_plain(dy.astype(jnp.float32)), strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=tolerance, atol=tolerance)


def test_what_a_norm_and_a_gate_keep_for_the_backward_pass():
    """Their arguments and a number a row, in the dtype of computing: nothing of their size in float32."""
    x = jnp.ones((4, 256), jnp.bfloat16)
    for function, arguments in [(lambda x: rms_norm(x, jnp.ones(256), 1e-5), (x,)), (swiglu, (x, x))]:
        kept = jax.tree_util.tree_leaves(jax.vjp(function, *arguments)[1])
        assert not [a.shape for a in kept if a.dtype == jnp.float32 and a.size >= x.size]
