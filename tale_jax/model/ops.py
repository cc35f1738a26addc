"""Pure functions of the transformer: RMS norm, rotary positions, dropout, products in a natural layout, attention.

Axes: B batch, T query position, S key position, N heads, K key/value heads, G query heads for each of those, H head
width. Every batched product has one contracted axis, because Apple's jax-metal computes no other.

Layout. XLA on CPU multiplies bfloat16 natively only where the left operand contracts its last axis and the right its
first; any other form runs several times slower, in float32, and the gradients of `x @ w` are of those forms.
`matmul(..., natural=True)` writes the gradients with transposes that really happen. Values are the same either way.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

MASKED = -1e30  # finite, so that a row with nothing to attend to stays finite
SMALLEST_BLOCK, MOST_BLOCKS = 128, 16  # rows of a block of causal attention: fewer do not pay, more cost compilation


def after(saved: Any, gradient: Any) -> tuple[Any, Any]:
    """What a forward pass saved, not to be touched before the gradient is there.

    Otherwise XLA finds that the backward pass computes some things again and keeps them from the forward pass instead,
    or works ahead: transposes and recomputed weights of every layer then wait in memory, twice what was saved.
    """
    return jax.lax.optimization_barrier((saved, gradient))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """Root mean square normalisation (Zhang and Sennrich 2019), computed in float32, returned in the dtype of `x`.

    Its gradient is written by hand: for the backward pass only `x` and one number a row are kept, where automatic
    differentiation keeps three float32 copies of `x`.
    """
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, Array, Array]]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype), (x, scale, inverse)


def _rms_norm_backward(eps: float, saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array]:
    (x, scale, inverse), dy = after(saved, dy)
    normed, dy = x.astype(jnp.float32) * inverse, dy.astype(jnp.float32)
    dnormed = dy * scale.astype(jnp.float32)
    dx = inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True))
    dscale = jnp.sum((dy * normed).reshape(-1, x.shape[-1]), axis=0)
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@jax.custom_vjp
def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) * up (Shazeer 2020). The backward pass computes the sigmoid again and keeps its arguments only."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _swiglu_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    saved, dy = after(saved, dy)
    gate, up, dy = (x.astype(jnp.float32) for x in (*saved, dy))
    sigmoid = jax.nn.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return dgate.astype(saved[0].dtype), (dy * gate * sigmoid).astype(saved[1].dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def rotary_angles(positions: Int[Array, "B T"], head_dim: int, base: float) -> Float[Array, "B T half"]:
    """Angles of rotary position embedding (Su et al. 2021) for the head_dim/2 pairs, in float32 radians."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[..., None].astype(jnp.float32) * frequencies


def rotate(x: Float[Array, "B N T H"], angles: Float[Array, "B T half"]) -> Float[Array, "B N T H"]:
    """Turns each pair (i, i + H/2) of `x` by its angle: the pairing of LLaMA as Hugging Face stores it."""
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def dropout(x: Float[Array, "*B D"], share: float, key: UInt32[Array, " 2"]) -> Float[Array, "*B D"]:
    """Zeros about `share` of the elements, each for itself, and scales the rest so that their mean stays.

    `share` is taken to the nearest 1/256, though never as 0 or 1: one random word then serves four elements, and random
    words are what dropout costs on a CPU. Which are dropped does not depend on how the array is spread over devices.
    """
    dropped = min(255, max(1, round(256 * share)))
    # The barrier keeps XLA from drawing a word again for each of its bytes.
    words = jax.lax.optimization_barrier(jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 4)), jnp.uint32))
    kept = jnp.concatenate([((words >> shift) & 255) >= dropped for shift in (0, 8, 16, 24)], axis=-1)
    return jnp.where(kept[..., : x.shape[-1]], x * (256 / (256 - dropped)), 0)


def product(x: Float[Array, "... C"], y: Float[Array, "... C N"], dtype: Any = None) -> Float[Array, "... N"]:
    """`x @ y` as it stands, in `dtype` (None: that of `x`) however XLA sums it."""
    return jnp.matmul(x, y, preferred_element_type=dtype or x.dtype)


def transpose(x: Float[Array, "*B M N"], natural: bool) -> Float[Array, "*B N M"]:
    """Swaps the last two axes; with `natural`, in memory too, so that XLA cannot fold it back into a product."""
    rows = x.shape[-2]
    if not natural or rows % 8:
        return jnp.swapaxes(x, -1, -2)
    split = x.reshape(*x.shape[:-2], rows // 8, 8, x.shape[-1])
    return jax.lax.optimization_barrier(jnp.moveaxis(split, -1, -3)).reshape(*x.shape[:-2], x.shape[-1], rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def split_heads(x: Float[Array, "B T C"], count: int, natural: bool) -> Float[Array, "B {count} T H"]:
    """The heads of each position; with `natural`, in memory too (see `transpose`)."""
    batch, length, width = x.shape
    if not natural or length % 8:
        return x.reshape(batch, length, count, width // count).swapaxes(1, 2)
    split = x.reshape(batch, length // 8, 8, count, width // count)
    return jax.lax.optimization_barrier(jnp.moveaxis(split, 3, 1)).reshape(batch, count, length, width // count)


def _split_heads_forward(x: Array, count: int, natural: bool) -> tuple[Array, None]:
    return split_heads(x, count, natural), None


def _split_heads_backward(count: int, natural: bool, saved: None, dy: Array) -> tuple[Array]:
    batch, _, length, width = dy.shape
    return (dy.swapaxes(1, 2).reshape(batch, length, count * width),)


split_heads.defvjp(_split_heads_forward, _split_heads_backward)


def _transposed_times(x: Array, y: Array, natural: bool) -> Array:
    """x.T @ y, in the order that moves less memory: by transposing x, or y and the result."""
    (rows, left), right = x.shape[-2:], y.shape[-1]
    if natural and rows * left > rows * right + left * right:
        return transpose(product(transpose(y, natural), x), natural)
    return product(transpose(x, natural), y)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, "*B C"], w: Float[Array, "C N"], natural: bool = False) -> Float[Array, "*B N"]:
    """`x @ w`, in the dtype of `x`."""
    return product(x, w)


def _matmul_forward(x: Array, w: Array, natural: bool) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, w, natural), (x, w)


def _matmul_backward(natural: bool, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    (x, w), dy = after(saved, dy)
    dx = product(dy, transpose(w, natural))
    return dx, _transposed_times(_rows(x), _rows(dy), natural)


matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_transposed(x: Float[Array, "*B C"], w: Float[Array, "N C"], natural: bool = False) -> Float[Array, "*B N"]:
    """`x @ w.T` as `matmul` does it: for the embedding as head."""
    return product(x, transpose(w, natural))


def _matmul_transposed_forward(x: Array, w: Array, natural: bool) -> tuple[Array, tuple[Array, Array]]:
    return matmul_transposed(x, w, natural), (x, w)


def _matmul_transposed_backward(natural: bool, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    dx = product(dy, w)
    return dx, _transposed_times(_rows(dy), _rows(x), natural)


matmul_transposed.defvjp(_matmul_transposed_forward, _matmul_transposed_backward)


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
    natural: bool = False,
    causal: bool = False,
) -> Float[Array, "B N T H"]:
    """Scaled dot-product attention with grouped queries (Ainslie et al. 2023), softmax in float32.

    With `causal`, which says that no query may look at a key after its own index, blocks of queries meet only the keys
    up to their end, one block after another, so that no more scores than those of one are in memory, forward or
    backward (Dao et al. 2022).
    """
    return _attend_in_blocks(query, key, value, mask, natural, causal)[0]


def _blocks(length: int, key_length: int, causal: bool) -> list[tuple[slice, slice]]:
    """Which queries meet which keys: blocks of both."""
    if not causal:
        return [(slice(0, length), slice(0, key_length))]
    size = max(SMALLEST_BLOCK, -(-length // MOST_BLOCKS))
    ends = [(start, min(start + size, length)) for start in range(0, length, size)]
    return [(slice(start, end), slice(0, end)) for start, end in ends]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend_in_blocks(
    query: Array, key: Array, value: Array, mask: Array, natural: bool, causal: bool
) -> tuple[Array, tuple[Array, ...]]:
    """Attention, and the log-sum-exp of each row of scores, block by block."""
    parts, sums = [], []
    for queries, keys in _blocks(query.shape[2], key.shape[2], causal):
        block = query[:, :, queries]
        if parts:  # not before the last block is done
            block, parts[-1] = jax.lax.optimization_barrier((block, parts[-1]))
        mixed, log_sum = _attend(block, key[:, :, keys], value[:, :, keys], mask[:, queries, keys], natural)
        parts.append(mixed)
        sums.append(log_sum)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2), tuple(sums)


def _attend_in_blocks_forward(
    query: Array, key: Array, value: Array, mask: Array, natural: bool, causal: bool
) -> tuple[Any, tuple[Any, ...]]:
    mixed, sums = _attend_in_blocks(query, key, value, mask, natural, causal)
    return (mixed, sums), (query, key, value, mask, mixed, sums)


def _attend_in_blocks_backward(
    natural: bool, causal: bool, saved: tuple[Any, ...], gradient: tuple[Array, Any]
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
        part, *here = _attend_backward(natural, (query[:, :, queries], *seen), block)
        dquery.insert(0, part)
        dkeys = [_add_to_first(d, h) for d, h in zip(dkeys, here, strict=True)] if dkeys else here
    dkey, dvalue = dkeys
    dquery = dquery[0] if len(dquery) == 1 else jnp.concatenate(dquery, axis=2)
    return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype), None


_attend_in_blocks.defvjp(_attend_in_blocks_forward, _attend_in_blocks_backward)


def _add_to_first(x: Array, first: Array) -> Array:
    """`x` with `first` added to as many of its leading positions."""
    end = first.shape[2]
    return jnp.concatenate([x[:, :, :end] + first, x[:, :, end:]], axis=2)


def fused_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Float[Array, "B N T H"]:
    """Causal `attention` of whole sequences in half precision, by cuDNN's flash attention."""
    rows = (x.swapaxes(1, 2) for x in (query, key, value))
    return jax.nn.dot_product_attention(*rows, is_causal=True, implementation=implementation).swapaxes(1, 2)


def _scores(query: Array, key: Array, mask: Array, natural: bool) -> Array:
    """Masked scores [B, K, G T, S] in float32.

    The G query heads that share a key/value head are laid end to end along T: no key or value is copied for them, and
    each product contracts one axis.
    """
    (batch, heads, length, width), (kv_heads, key_length) = query.shape, key.shape[1:3]
    grouped = (query * width**-0.5).reshape(batch, kv_heads, -1, width)
    scores = product(grouped, transpose(key, natural), jnp.float32)
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, length, key_length)
    return jnp.where(mask[:, None, None], scores, MASKED).reshape(batch, kv_heads, -1, key_length)


def _attend(query: Array, key: Array, value: Array, mask: Array, natural: bool) -> tuple[Array, Array]:
    """Attention of all these queries to all these keys, and the log-sum-exp of each row of scores."""
    scores = _scores(query, key, mask, natural)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak).astype(value.dtype)
    total = jnp.sum(weights, axis=-1, keepdims=True, dtype=jnp.float32)
    mixed = (product(weights, value, jnp.float32) / total).astype(value.dtype)
    return mixed.reshape(query.shape), peak + jnp.log(total)


def _attend_backward(natural: bool, saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    """Recomputes the weights from the log-sum-exp of each row, which is all that the forward pass keeps of them.

    The gradients of keys and values are in float32, to be summed over blocks.
    """
    query, key, value, mask, log_sum, mixed = saved
    dtype, width = value.dtype, query.shape[-1]
    dy, mixed = (x.reshape(*key.shape[:2], -1, width) for x in (dy, mixed))
    weights = jnp.exp(_scores(query, key, mask, natural) - log_sum).astype(dtype)
    dvalue = product(transpose(weights, natural), dy)
    dweights = product(dy, transpose(value, natural)).astype(jnp.float32)
    along = jnp.sum(dy.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1, keepdims=True)
    dscores = (weights.astype(jnp.float32) * (dweights - along)).astype(dtype)
    dquery = product(dscores, key).reshape(query.shape) * width**-0.5
    grouped = (query * width**-0.5).reshape(dy.shape)
    dkey = product(transpose(dscores, natural), grouped)
    return dquery, dkey.astype(jnp.float32), dvalue.astype(jnp.float32)


def attend_one(
    query: Float[Array, "B N 1 H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "_ 1 S"],
) -> Float[Array, "B N 1 H"]:
    """`attention` of one query a sequence, as decoding asks for it: the same values, by sums instead of products.

    A product of one row is no work, only a passage over the cache. As a sum XLA fuses it with the conversion to
    float32; as a product of bfloat16 on a CPU it first writes the whole cache again in float32 (up to seven times
    slower, measured).
    """
    batch, heads, _, width = query.shape
    grouped = (query * width**-0.5).reshape(batch, key.shape[1], -1, 1, width).astype(jnp.float32)
    scores = jnp.sum(grouped * key[:, :, None].astype(jnp.float32), axis=-1)  # [B, K, G, S]
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)
    mixed = jnp.sum(weights[..., None] * value[:, :, None].astype(jnp.float32), axis=-2)
    return mixed.reshape(batch, heads, 1, width).astype(value.dtype)
