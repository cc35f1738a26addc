"""Attention: rotary positions, masks, and causal attention in blocks that never holds more scores than those of one.

Axes: B batch, T query position, S key position, N heads, K key/value heads, G query heads for each of those, H head
width. Every batched product contracts one axis, because Apple's jax-metal computes no other.

Blockwise attention (Dao et al. 2022, FlashAttention). Scores [T, S] of a causal model are needed below the diagonal
only. Queries are taken in blocks; block i meets the keys up to its own end, in one product:

            keys S ──►
          ┌─────┬─────┬─────┬─────┐      forward, from the top: softmax of one row of blocks, and of it only the
 queries  │▒▒▒▒▒│     │     │     │      log-sum-exp of each query is kept: [T] numbers instead of [T, S]
    T     ├─────┼─────┤     │     │
    │     │▒▒▒▒▒ ▒▒▒▒▒│     │     │      backward, from the bottom: the scores of a row of blocks are computed again,
    ▼     ├───────────┼─────┤     │      exp(scores - log-sum-exp) is the softmax, and the gradients of keys and
          │▒▒▒▒▒ ▒▒▒▒▒ ▒▒▒▒▒│     │      values are summed over the rows in float32
          ├─────────────────┼─────┤
          │▒▒▒▒▒ ▒▒▒▒▒ ▒▒▒▒▒ ▒▒▒▒▒│      an optimization barrier between rows keeps XLA from working on two at once
          └───────────────────────┘
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tale_jax.model.layers import after, product, transpose

MASKED = -1e30  # finite, so that a row with nothing to attend to stays finite
MIN_BLOCK, MAX_BLOCKS = 128, 16  # rows of a block of causal attention: fewer do not pay, more cost compilation
SLOW_TURNS, FAST_TURNS = 1.0, 4.0  # of a pair in the context: Llama 3.1's low_freq_factor and high_freq_factor


def rotary_frequencies(head_dim: int, base: float, scaling: float = 0, original_len: int = 1) -> Float[Array, " half"]:
    """Radians that each of the head_dim/2 pairs turns per position (Su et al. 2021).

    `scaling` as in Llama 3.1: a pair that turns less than once in `original_len` positions turns so many times slower,
    one that turns more than four times as before, and between these the two are mixed.
    """
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if not scaling:
        return frequencies
    turns = original_len * frequencies / (2 * math.pi)
    kept = jnp.clip((turns - SLOW_TURNS) / (FAST_TURNS - SLOW_TURNS), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling)


def rotary_angles(positions: Int[Array, "B T"], frequencies: Float[Array, " half"]) -> Float[Array, "B T half"]:
    """Angles of rotary position embedding, in float32 radians."""
    return positions[..., None].astype(jnp.float32) * frequencies


def rotate(x: Float[Array, "B N T H"], angles: Float[Array, "B T half"]) -> Float[Array, "B N T H"]:
    """Turns each pair (i, i + H/2) of `x` by its angle: the pairing of LLaMA as Hugging Face stores it."""
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_mask(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """Where a query may look: at keys not after it, of its own segment, fewer than `window` tokens back (None: any).

    A negative key position marks an empty slot of the cache.
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    mask = (key <= query) & (key >= 0)
    if window is not None:
        mask &= key > query - window
    if query_segments is not None and key_segments is not None:
        mask &= query_segments[:, :, None] == key_segments[:, None, :]
    return mask


def attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "_ T S"],
    materialize_transposes: bool = False,
    causal: bool = False,
) -> Float[Array, "B N T H"]:
    """Scaled dot-product attention with grouped queries (Ainslie et al. 2023), softmax in float32.

    With `causal`, which says that no query may look at a key after its own index, blocks of queries meet only the keys
    up to their end, one block after another, so that no more scores than those of one are in memory, forward or
    backward (Dao et al. 2022).
    """
    return _attend_in_blocks(query, key, value, mask, materialize_transposes, causal)[0]


def _blocks(length: int, key_length: int, causal: bool) -> list[tuple[slice, slice]]:
    """Which queries meet which keys: blocks of both."""
    if not causal:
        return [(slice(0, length), slice(0, key_length))]
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    ends = [(start, min(start + size, length)) for start in range(0, length, size)]
    return [(slice(start, end), slice(0, end)) for start, end in ends]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend_in_blocks(
    query: Array, key: Array, value: Array, mask: Array, materialize_transposes: bool, causal: bool
) -> tuple[Array, tuple[Array, ...]]:
    """Attention, and the log-sum-exp of each row of scores, block by block."""
    parts, sums = [], []
    for queries, keys in _blocks(query.shape[2], key.shape[2], causal):
        block = query[:, :, queries]
        if parts:  # not before the last block is done
            block, parts[-1] = jax.lax.optimization_barrier((block, parts[-1]))
        mixed, log_sum = _attend(
            block, key[:, :, keys], value[:, :, keys], mask[:, queries, keys], materialize_transposes
        )
        parts.append(mixed)
        sums.append(log_sum)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2), tuple(sums)


def _attend_in_blocks_forward(
    query: Array, key: Array, value: Array, mask: Array, materialize_transposes: bool, causal: bool
) -> tuple[Any, tuple[Any, ...]]:
    mixed, sums = _attend_in_blocks(query, key, value, mask, materialize_transposes, causal)
    return (mixed, sums), (query, key, value, mask, mixed, sums)


def _attend_in_blocks_backward(
    materialize_transposes: bool, causal: bool, saved: tuple[Any, ...], gradient: tuple[Array, Any]
) -> tuple[Array, Array, Array, None]:
    """From the last block, which meets all keys, to the first."""
    (query, key, value, mask, mixed, sums), dy = after(saved, gradient[0])
    dquery, dkeys = [], []  # of blocks; of key and value so far
    blocks = _blocks(query.shape[2], key.shape[2], causal)
    for (queries, keys), log_sum in zip(reversed(blocks), reversed(sums), strict=True):
        block = dy[:, :, queries]
        if dkeys:
            block, dkeys = jax.lax.optimization_barrier((block, dkeys))
        seen = key[:, :, keys], value[:, :, keys], mask[:, queries, keys], log_sum, mixed[:, :, queries]
        part, *dkey_value = _attend_backward(materialize_transposes, (query[:, :, queries], *seen), block)
        dquery.insert(0, part)
        dkeys = [_add_to_first(d, h) for d, h in zip(dkeys, dkey_value, strict=True)] if dkeys else dkey_value
    dkey, dvalue = dkeys
    dquery = dquery[0] if len(dquery) == 1 else jnp.concatenate(dquery, axis=2)
    return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype), None


_attend_in_blocks.defvjp(_attend_in_blocks_forward, _attend_in_blocks_backward)


def _add_to_first(x: Array, first: Array) -> Array:
    """`x` with `first` added to as many of its leading positions."""
    end = first.shape[2]
    return jnp.concatenate([x[:, :, :end] + first, x[:, :, end:]], axis=2)


def cudnn_causal_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Float[Array, "B N T H"]:
    """Causal `attention` of whole sequences in half precision, by cuDNN's flash attention."""
    rows = (x.swapaxes(1, 2) for x in (query, key, value))
    return jax.nn.dot_product_attention(*rows, is_causal=True, implementation=implementation).swapaxes(1, 2)


def _scores(query: Array, key: Array, mask: Array, materialize_transposes: bool) -> Array:
    """Masked scores [B, K, G T, S] in float32.

    The G query heads that share a key/value head are laid end to end along T: no key or value is copied for them, and
    each product contracts one axis.
    """
    (batch, heads, length, width), (kv_heads, key_length) = query.shape, key.shape[1:3]
    grouped = (query * width**-0.5).reshape(batch, kv_heads, -1, width)
    scores = product(grouped, transpose(key, materialize_transposes), jnp.float32)
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, length, key_length)
    return jnp.where(mask[:, None, None], scores, MASKED).reshape(batch, kv_heads, -1, key_length)


def _attend(query: Array, key: Array, value: Array, mask: Array, materialize_transposes: bool) -> tuple[Array, Array]:
    """Attention of all these queries to all these keys, and the log-sum-exp of each row of scores."""
    scores = _scores(query, key, mask, materialize_transposes)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak).astype(value.dtype)
    total = jnp.sum(weights, axis=-1, keepdims=True, dtype=jnp.float32)
    mixed = (product(weights, value, jnp.float32) / total).astype(value.dtype)
    return mixed.reshape(query.shape), peak + jnp.log(total)


def _attend_backward(materialize_transposes: bool, saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    """Recomputes the weights from the log-sum-exp of each row, which is all that the forward pass keeps of them.

    The gradients of keys and values are in float32, to be summed over blocks.
    """
    query, key, value, mask, log_sum, mixed = saved
    dtype, width = value.dtype, query.shape[-1]
    dy, mixed = (x.reshape(*key.shape[:2], -1, width) for x in (dy, mixed))
    weights = jnp.exp(_scores(query, key, mask, materialize_transposes) - log_sum).astype(dtype)
    dvalue = product(transpose(weights, materialize_transposes), dy)
    dweights = product(dy, transpose(value, materialize_transposes)).astype(jnp.float32)
    along = jnp.sum(dy.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1, keepdims=True)
    dscores = (weights.astype(jnp.float32) * (dweights - along)).astype(dtype)
    dquery = product(dscores, key).reshape(query.shape) * width**-0.5
    grouped = (query * width**-0.5).reshape(dy.shape)
    dkey = product(transpose(dscores, materialize_transposes), grouped)
    return dquery, dkey.astype(jnp.float32), dvalue.astype(jnp.float32)


def attention_weights(
    query: Float[Array, "B N T H"], key: Float[Array, "B K S H"], mask: Bool[Array, "_ T S"]
) -> Float[Array, "B N T S"]:
    """How much of each key's value `attention` takes for each query, in float32; each row sums to 1."""
    batch, heads, length, _ = query.shape
    return jax.nn.softmax(_scores(query, key, mask, False), axis=-1).reshape(batch, heads, length, key.shape[2])
