"""Attention in blocks, masks and positions against the plain formulas, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tale_jax.model.attention import (
    attention,
    causal_mask,
    rotary_angles,
    rotary_frequencies,
    rotate,
)
from tale_jax.model.decoding import attend_one
from tale_jax.model.packed import document_segments


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


def value_and_gradients(attend):
    """A compiled function of query, key, value, mask and the gradient of the result."""

    def f(query, key, value, mask, dy):
        mixed, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask), query, key, value)
        return mixed, *pull(dy)

    return jax.jit(f)


@pytest.mark.parametrize("materialize_transposes", [False, True])
@pytest.mark.parametrize("length", [24, 208, 300])  # one block, a short last one, three
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_blocks_of_attention_are_the_plain_formula(materialize_transposes, length, kv_heads):
    query, key, value, dy = inputs(length, kv_heads=kv_heads)
    positions = jnp.arange(length)[None]
    found = value_and_gradients(lambda *args: attention(*args, materialize_transposes, causal=True))
    known = value_and_gradients(plain)
    for segments in (None, positions // 20):
        mask = causal_mask(positions, positions, segments, segments)
        for a, b in zip(found(query, key, value, mask, dy), known(query, key, value, mask, dy), strict=True):
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


@pytest.mark.parametrize("materialize_transposes", [False, True])
def test_bfloat16_attention_stays_near_float32(materialize_transposes):
    (*arrays, dy), (*narrow, narrow_dy) = inputs(130), inputs(130, dtype=jnp.bfloat16)
    positions = jnp.arange(130)[None]
    mask = causal_mask(positions, positions)
    attend = value_and_gradients(lambda *args: attention(*args, materialize_transposes, causal=True))
    for a, b in zip(attend(*narrow, mask, narrow_dy), attend(*arrays, mask, dy), strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.abs(a.astype(jnp.float32) - b).max() < 0.03 * jnp.abs(b).max()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_of_one_query_is_the_plain_formula(kv_heads, dtype):
    """As decoding asks for it, with empty and masked slots among the keys."""
    query, key, value, _ = inputs(24, kv_heads=kv_heads, dtype=dtype)
    mask = (jnp.arange(24) % 3 > 0)[None, None]
    found = attend_one(query[:, :, :1], key, value, mask)
    assert found.dtype == dtype
    known = plain(*(x.astype(jnp.float32) for x in (query[:, :, :1], key, value)), mask)
    np.testing.assert_allclose(found.astype(jnp.float32), known, atol=1e-5 if dtype == jnp.float32 else 2e-2)


def test_a_query_looks_at_itself_and_back_within_its_segment_and_window():
    positions = jnp.arange(6)[None]
    every = np.tril(np.ones((6, 6), bool))
    np.testing.assert_array_equal(causal_mask(positions, positions)[0], every)
    segments = jnp.array([[0, 0, 1, 1, 1, 2]])
    same = np.asarray(segments[0][:, None] == segments[0][None])
    np.testing.assert_array_equal(causal_mask(positions, positions, segments, segments)[0], every & same)
    near = np.triu(np.ones((6, 6), bool), -2)  # itself and two before
    np.testing.assert_array_equal(causal_mask(positions, positions, window=3)[0], every & near)
    empty = positions.at[0, 1].set(-1)  # a slot of the cache that holds nothing
    assert not causal_mask(positions, empty)[0, :, 1].any()


def test_segments_count_documents():
    tokens = jnp.array([[5, 6, 1, 7, 8, 1, 9], [1, 1, 5, 5, 5, 5, 5]])
    np.testing.assert_array_equal(document_segments(tokens, 1), [[0, 0, 1, 1, 1, 2, 2], [1, 2, 2, 2, 2, 2, 2]])


def test_rotation_is_a_product_with_complex_numbers():
    """Pair i of a head is multiplied by exp(i * position * base ** (-2i / width)), so lengths stay."""
    x, positions = inputs(7)[0], jnp.broadcast_to(jnp.arange(7) + 3, (2, 7))
    found = np.asarray(rotate(x, rotary_angles(positions, rotary_frequencies(8, 100.0))))
    pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
    turned = pairs * np.exp(1j * np.arange(3, 10)[:, None] * 100.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(found[..., :4] + 1j * found[..., 4:], turned, atol=1e-5)


def test_scaled_frequencies_are_those_of_llama_3():
    """By the wavelengths of Llama 3.1's paper code: short ones stay, long ones are divided, between them a mean."""
    plain = 500_000.0 ** (-np.arange(0, 128, 2) / 128)
    wavelengths = 2 * np.pi / plain
    share = (8192 / wavelengths - 1.0) / (4.0 - 1.0)
    wanted = np.where(wavelengths < 8192 / 4, plain, plain / 8)
    between = (wavelengths >= 8192 / 4) & (wavelengths <= 8192)
    wanted[between] = ((1 - share) * plain / 8 + share * plain)[between]
    assert between.any() and (wavelengths > 8192).any()
    np.testing.assert_allclose(rotary_frequencies(128, 500_000.0, 8.0, 8192), wanted, rtol=2e-5)
    np.testing.assert_array_equal(rotary_frequencies(128, 500_000.0, 0.0, 5), rotary_frequencies(128, 500_000.0))
