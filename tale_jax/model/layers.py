"""Pure functions of the transformer, but for attention: RMS norm, SwiGLU, dropout, and products.

Layout of products. XLA on CPU multiplies bfloat16 natively only where the left operand contracts its last axis and the
right its first; any other form runs several times slower, in float32, and the gradients of `x @ w` are of those forms.
With `materialize_transposes` the gradients are written with transposes that really happen in memory. Values are the
same either way.

A new layer is a function here and a linen module in `transformer.py`. Where automatic differentiation keeps too much
for the backward pass, the gradient is our own: a test compares each with that of the plain formula.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32


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


def dropout(x: Float[Array, "*B D"], rate: float, key: UInt32[Array, " 2"]) -> Float[Array, "*B D"]:
    """Zeros about `rate` of the elements, each for itself, and scales the rest so that their mean stays.

    `rate` is taken to the nearest 1/256, though never as 0 or 1: one random word then serves four elements, and random
    words are what dropout costs on a CPU. Which are dropped does not depend on how the array is spread over devices.
    """
    dropped = min(255, max(1, round(256 * rate)))
    # The barrier keeps XLA from drawing a word again for each of its bytes.
    words = jax.lax.optimization_barrier(jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 4)), jnp.uint32))
    kept = jnp.concatenate([((words >> shift) & 255) >= dropped for shift in (0, 8, 16, 24)], axis=-1)
    return jnp.where(kept[..., : x.shape[-1]], x * (256 / (256 - dropped)), 0)


def product(x: Float[Array, "... C"], y: Float[Array, "... C N"], dtype: Any = None) -> Float[Array, "... N"]:
    """`x @ y` as it stands, in `dtype` (None: that of `x`) however XLA sums it."""
    return jnp.matmul(x, y, preferred_element_type=dtype or x.dtype)


def transpose(x: Float[Array, "*B M N"], materialize_transposes: bool) -> Float[Array, "*B N M"]:
    """Swaps the last two axes; with `materialize_transposes`, in memory too, so that XLA cannot fold it back into a
    product."""
    rows = x.shape[-2]
    if not materialize_transposes or rows % 8:
        return jnp.swapaxes(x, -1, -2)
    split = x.reshape(*x.shape[:-2], rows // 8, 8, x.shape[-1])
    return jax.lax.optimization_barrier(jnp.moveaxis(split, -1, -3)).reshape(*x.shape[:-2], x.shape[-1], rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def split_heads(x: Float[Array, "B T C"], count: int, materialize_transposes: bool) -> Float[Array, "B {count} T H"]:
    """The heads of each position; with `materialize_transposes`, in memory too (see `transpose`)."""
    batch, length, width = x.shape
    if not materialize_transposes or length % 8:
        return x.reshape(batch, length, count, width // count).swapaxes(1, 2)
    split = x.reshape(batch, length // 8, 8, count, width // count)
    return jax.lax.optimization_barrier(jnp.moveaxis(split, 3, 1)).reshape(batch, count, length, width // count)


def _split_heads_forward(x: Array, count: int, materialize_transposes: bool) -> tuple[Array, None]:
    return split_heads(x, count, materialize_transposes), None


def _split_heads_backward(count: int, materialize_transposes: bool, saved: None, dy: Array) -> tuple[Array]:
    batch, _, length, width = dy.shape
    return (dy.swapaxes(1, 2).reshape(batch, length, count * width),)


split_heads.defvjp(_split_heads_forward, _split_heads_backward)


def _transposed_times(x: Array, y: Array, materialize_transposes: bool) -> Array:
    """x.T @ y, in the order that moves less memory: by transposing x, or y and the result."""
    (rows, left), right = x.shape[-2:], y.shape[-1]
    if materialize_transposes and rows * left > rows * right + left * right:
        return transpose(product(transpose(y, materialize_transposes), x), materialize_transposes)
    return product(transpose(x, materialize_transposes), y)


def _flatten(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "*B C"], w: Float[Array, "C N"], materialize_transposes: bool = False
) -> Float[Array, "*B N"]:
    """`x @ w`, in the dtype of `x`."""
    return product(x, w)


def _matmul_forward(x: Array, w: Array, materialize_transposes: bool) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, w, materialize_transposes), (x, w)


def _matmul_backward(materialize_transposes: bool, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    (x, w), dy = after(saved, dy)
    dx = product(dy, transpose(w, materialize_transposes))
    return dx, _transposed_times(_flatten(x), _flatten(dy), materialize_transposes)


matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_transposed(
    x: Float[Array, "*B C"], w: Float[Array, "N C"], materialize_transposes: bool = False
) -> Float[Array, "*B N"]:
    """`x @ w.T` as `matmul` does it: for the embedding as head."""
    return product(x, transpose(w, materialize_transposes))


def _matmul_transposed_forward(x: Array, w: Array, materialize_transposes: bool) -> tuple[Array, tuple[Array, Array]]:
    return matmul_transposed(x, w, materialize_transposes), (x, w)


def _matmul_transposed_backward(
    materialize_transposes: bool, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = saved
    dx = product(dy, w)
    return dx, _transposed_times(_flatten(dy), _flatten(x), materialize_transposes)


matmul_transposed.defvjp(_matmul_transposed_forward, _matmul_transposed_backward)
