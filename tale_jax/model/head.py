"""The head: logits, and the cross-entropy of the next token without ever holding all the logits.

At this scale the logits are the largest array of a step: 2,048 tokens and 8,192 pieces make 33 MB in bfloat16, and
automatic differentiation would keep several copies of it. Here a chunk of positions is taken from hidden states to
losses at a time. When gradients are wanted, the chunk's share of them is computed while its logits are still in the
cache: the gradient of a logit is softmax minus one-hot, so nothing of the size of the logits is kept for a backward
pass. The idea is that of the fused losses of Hsu et al. 2024 (Liger Kernel) and Wijmans et al. 2024 (Cut Your Losses).

Axes: B batch, T position, D model width, V vocabulary. The table is the embedding [V, D] of a tied head, or a kernel
[D, V] of its own, in float32. A logit soft cap of 0 is off.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tale_jax.model import ops


class Head(NamedTuple):
    """What a head is, besides its table: hashable, so that it can be an argument known at compilation."""

    tied: bool
    softcap: float = 0.0
    natural: bool = False  # layout of products, see `ops`

    @property
    def chunk_logits(self) -> int:
        """Logits computed at once: few enough for a CPU's cache; elsewhere only memory is the limit."""
        return 2**21 if self.natural else 2**26


def logits(x: Float[Array, "*B D"], table: Float[Array, "_ _"], head: Head) -> Float[Array, "*B V"]:
    """Logits of every token, in the dtype of `x`."""
    product = ops.matmul_transposed if head.tied else ops.matmul
    return _cap(product(x, table.astype(x.dtype), head.natural), head)


def cross_entropy(
    x: Float[Array, "B T D"], table: Float[Array, "_ _"], targets: Int[Array, "B T"], head: Head
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, in float32: what scoring needs."""
    kernel = _kernel(table, x.dtype, head)

    def body(carry: None, chunk: tuple[Array, Array]) -> tuple[None, Array]:
        x, targets = chunk
        return carry, _losses(_cap(ops.product(x, kernel), head), targets)[1]

    return _over_chunks(body, None, (x, targets), kernel.shape[1], head)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_cross_entropy(
    x: Float[Array, "B T D"],
    table: Float[Array, "_ _"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    head: Head,
) -> Float[Array, ""]:
    """Sum over tokens of weight times negative log-likelihood in nats, with gradients for `x` and `table`."""
    return jnp.sum(weights * cross_entropy(x, table, targets, head))


def _forward(x: Array, table: Array, targets: Array, weights: Array, head: Head) -> tuple[Array, tuple[Array, Array]]:
    kernel = _kernel(table, x.dtype, head)
    back = table.astype(x.dtype) if head.tied else ops.transpose(kernel, head.natural)

    def body(total: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        loss, dkernel = total
        x, targets, weights = chunk
        capped = _cap(ops.product(x, kernel), head)
        log_sum, losses = _losses(capped, targets)
        wide = capped.astype(jnp.float32)
        hit = jnp.arange(wide.shape[-1], dtype=targets.dtype) == targets[..., None]
        dlogits = (jnp.exp(wide - log_sum[..., None]) - hit) * weights[..., None]
        if head.softcap:
            dlogits *= 1 - jnp.square(wide / head.softcap)
        dlogits = dlogits.astype(x.dtype)
        rows, drows = x.reshape(-1, x.shape[-1]), dlogits.reshape(-1, dlogits.shape[-1])
        # Summed in float32 over chunks; a product of bfloat16 into float32 exists on CPU in the natural layout only.
        dkernel += ops.product(ops.transpose(rows, head.natural), drows, jnp.float32 if head.natural else x.dtype)
        return (loss + jnp.sum(losses * weights), dkernel), ops.product(dlogits, back)

    zero = jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape, jnp.float32)
    (loss, dkernel), dx = _over_chunks(body, zero, (x, targets, weights), kernel.shape[1], head)
    # The barrier keeps XLA from folding the transpose back into the product.
    return loss, (dx, jax.lax.optimization_barrier(dkernel).T if head.tied else dkernel)


def _backward(head: Head, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array, None, None]:
    dx, dtable = saved
    return dx * dy.astype(dx.dtype), dtable * dy, None, None


weighted_cross_entropy.defvjp(_forward, _backward)


def _kernel(table: Array, dtype: Any, head: Head) -> Array:
    """The table as [D, V] in the dtype of computing."""
    return ops.transpose(table.astype(dtype), head.natural) if head.tied else table.astype(dtype)


def _cap(logits: Array, head: Head) -> Array:
    return head.softcap * jnp.tanh(logits / head.softcap) if head.softcap else logits


def _losses(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Log-sum-exp of each row, and the nats of its target."""
    peak = jnp.max(logits, axis=-1, keepdims=True).astype(jnp.float32)
    log_sum = jnp.log(jnp.sum(jnp.exp(logits.astype(jnp.float32) - peak), axis=-1)) + peak[..., 0]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_sum, log_sum - chosen.astype(jnp.float32)


def _over_chunks(
    body: Callable[[Any, Any], tuple[Any, Array]], carry: Any, arrays: tuple[Array, ...], vocab_size: int, head: Head
) -> tuple[Any, Array]:
    """`jax.lax.scan` of `body` over chunks of positions: cut along T, so that a batch stays spread over devices."""
    batch, length = arrays[0].shape[:2]
    size = max(1, min(length, head.chunk_logits // (batch * vocab_size)))
    size = -(-length // -(-length // size))  # equal chunks, but for the last
    num = length // size

    def cut(x: Array) -> Array:
        return x[:, : num * size].reshape(batch, num, size, *x.shape[2:]).swapaxes(0, 1)

    if num == 1:
        carry, out = body(carry, tuple(x[:, :size] for x in arrays))
    else:
        carry, out = jax.lax.scan(body, carry, tuple(cut(x) for x in arrays))
        out = out.swapaxes(0, 1).reshape(batch, num * size, *out.shape[3:])
    if num * size < length:
        carry, last = body(carry, tuple(x[:, num * size :] for x in arrays))
        out = jnp.concatenate([out, last], axis=1)
    return carry, out
