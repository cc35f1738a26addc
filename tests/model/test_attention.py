"""Blocked attention and natural layout against the plain formulas, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_config

from tale_jax.model import layers as ops
from tale_jax.training.step import make_trainer


def inputs(length, heads=4, kv_heads=2, width=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    shapes = [(2, heads, length, width)] + 2 * [(2, kv_heads, length, width)] + [(2, heads, length, width)]
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def plain(query, key, value, mask):
    """Every query head with a key and value of its own, the whole matrix of scores, automatic differentiation."""
    shared = query.shape[1] // key.shape[1]
    key, value = jnp.repeat(key, shared, axis=1), jnp.repeat(value, shared, axis=1)
    scores = jnp.einsum("bnth,bnsh->bnts", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1), value)


def value_and_gradients(attend, query, key, value, dy):
    mixed, pull = jax.vjp(attend, query, key, value)
    return mixed, *pull(dy)


@pytest.mark.parametrize("materialize_transposes", [False, True])
@pytest.mark.parametrize("length", [24, 208, 300])  # one block, a short last one, three
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_blocks_of_attention_are_the_plain_formula(materialize_transposes, length, documents, kv_heads):
    query, key, value, dy = inputs(length, kv_heads=kv_heads)
    positions = jnp.arange(length)[None]
    segments = positions // 20 if documents else None
    mask = causal_mask(positions, positions, segments, segments)
    mine = value_and_gradients(
        lambda q, k, v: attention(q, k, v, mask, materialize_transposes, causal=True), query, key, value, dy
    )
    known = value_and_gradients(lambda q, k, v: plain(q, k, v, mask), query, key, value, dy)
    for a, b in zip(mine, known, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_blocks_hold_no_square_of_scores():
    query, key, value, _ = inputs(512, heads=1, kv_heads=1)
    positions = jnp.arange(512)[None]
    mask = causal_mask(positions, positions)

    def total(causal):
        def f(q, k, v):
            return attention(q, k, v, mask, causal=causal).sum()

        return jax.jit(jax.grad(f, (0, 1, 2))).lower(query, key, value).as_text()

    assert "1x512x512xf32" in total(causal=False) and "1x512x512xf32" not in total(causal=True)


def test_bfloat16_attention_stays_near_float32():
    arrays, narrow = inputs(130), inputs(130, dtype=jnp.bfloat16)
    positions = jnp.arange(130)[None]
    mask = causal_mask(positions, positions)
    for materialize_transposes in (False, True):

        def attend(q, k, v, n=materialize_transposes):
            return attention(q, k, v, mask, n, causal=True)

        for a, b in zip(value_and_gradients(attend, *narrow), value_and_gradients(attend, *arrays), strict=True):
            assert a.dtype == jnp.bfloat16
            assert jnp.abs(a.astype(jnp.float32) - b).max() < 0.03 * jnp.abs(b).max()


@pytest.mark.parametrize("materialize_transposes", [False, True])
@pytest.mark.parametrize("shape", [(64, 24, 16), (64, 16, 24), (60, 24, 16)])  # fewer and more columns, an odd count
def test_products_have_the_gradients_of_automatic_differentiation(materialize_transposes, shape):
    rows, inner, columns = shape
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    x, dy = jax.random.normal(keys[0], (2, rows // 2, inner)), jax.random.normal(keys[1], (2, rows // 2, columns))
    for product, w, known in (
        (ops.matmul, jax.random.normal(keys[2], (inner, columns)), lambda x, w: x @ w),
        (ops.matmul_transposed, jax.random.normal(keys[3], (columns, inner)), lambda x, w: x @ w.T),
    ):
        y, pull = jax.vjp(lambda x, w, f=product: f(x, w, materialize_transposes), x, w)
        y2, pull2 = jax.vjp(known, x, w)
        for a, b in zip((y, *pull(dy)), (y2, *pull2(dy)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("share", "taken"), [(0.1, 26 / 256), (0.5, 0.5), (1e-9, 1 / 256), (0.9999, 255 / 256)])
@pytest.mark.parametrize("width", [64, 30])
def test_dropout_drops_the_share_and_keeps_the_mean(share, taken, width):
    x = jnp.ones((64, 256, width), jnp.bfloat16)
    y = np.asarray(ops.dropout(x, share, jax.random.PRNGKey(0)).astype(jnp.float32))
    np.testing.assert_allclose((y == 0).mean(), taken, atol=4 * (taken * (1 - taken) / y.size) ** 0.5)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - taken), rtol=0.005)
    if share == 0.5:
        columns = (y == 0).reshape(-1, width)
        pairs = np.corrcoef(columns.T) - np.eye(width)  # the bytes of a word, and words, know nothing of one another
        assert np.abs(pairs).max() < 6 / len(columns) ** 0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("mine", "plain"),
    [
        (
            lambda x, y: ops.rms_norm(x, 1 + y[0], 1e-5),
            lambda x, y: (1 + y[0]) * x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5),
        ),
        (ops.swiglu, lambda gate, up: gate * jax.nn.sigmoid(gate) * up),
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
    for function, arguments in [(lambda x: ops.rms_norm(x, jnp.ones(256), 1e-5), (x,)), (ops.swiglu, (x, x))]:
        kept = jax.tree_util.tree_leaves(jax.vjp(function, *arguments)[1])
        assert not [a.shape for a in kept if a.dtype == jnp.float32 and a.size >= x.size]


def test_a_step_does_not_work_ahead_of_its_gradients(cpu):
    """The compiled step keeps between its passes what was saved, not what the backward pass makes of it."""
    if not cpu.materialize_transposes:
        pytest.skip("XLA before jaxlib 0.11 plans memory otherwise")
    config = build_config(**{"model.num_layers": 4, "model.embed_dim": 128, "model.seq_len": 128, "batch_size": 8})
    trainer = make_trainer(config.with_total_steps(100), cpu, jnp.bfloat16, bos_id=1)
    rows, layers, width, inner = 8 * 128, 4, 128, 384
    saved = 2 * rows * layers * (8 * width + 3 * inner)  # bytes: branches' inputs, query, key, value, mixed, MLP
    state = sum(x.size * 4 for x in jax.tree_util.tree_leaves(trainer.abstract_state.params))
    assert trainer.compile().memory_analysis().temp_size_in_bytes < 1.5 * saved + 3 * state
