"""The head and the loss: logits, and the cross-entropy of the next token without ever holding all the logits.

At this scale the logits are the largest array of a step: 2,048 tokens and a vocabulary of 8,192 make 33 MB in bfloat16,
and automatic differentiation would keep several copies of it. Here a chunk of positions goes from hidden states to
losses at a time. When gradients are wanted, the chunk's share of them is computed while its logits are still in the
cache: the gradient of a logit is softmax minus one-hot, so nothing of the size of the logits is kept for a backward
pass. The idea is that of the fused losses of Hsu et al. 2024 (Liger Kernel) and Wijmans et al. 2024 (Cut Your Losses).

Axes: B batch, T position, D model width, V vocabulary. The table is the embedding [V, D] of a tied head, or a kernel
[D, V] of its own, in float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tale_jax.data.marks import is_learned
from tale_jax.model.layers import matmul, matmul_transposed, product, transpose


class Head(NamedTuple):
    """What a head is, besides its table: hashable, so that it can be an argument known at compilation."""

    tied: bool
    materialize_transposes: bool = False  # layout of products, see `layers.py`
    parts: int = 1  # of a batch, which lie on different devices

    @property
    def chunk_logits(self) -> int:
        """Logits computed at once: few enough for a CPU's cache; elsewhere only memory is the limit."""
        return self.parts * (2**21 if self.materialize_transposes else 2**26)


def loss_mask(targets: Any, bos_id: int) -> Any:
    """Which targets count, in training and in evaluation alike: BOS carries no text, so it is not learned. Of numpy
    arrays or of JAX's, of any shape. With `bos_id` of `marks.py` the marks tell."""
    return is_learned(targets, bos_id)


def logits(x: Float[Array, "*B D"], table: Float[Array, "_ _"], head: Head) -> Float[Array, "*B V"]:
    """Logits of every token, in the dtype of `x`."""
    times = matmul_transposed if head.tied else matmul
    return times(x, table.astype(x.dtype), head.materialize_transposes)


def cross_entropy(
    x: Float[Array, "B T D"], table: Float[Array, "_ _"], targets: Int[Array, "B T"], head: Head
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, in float32: what scoring needs."""
    kernel = _kernel(table, x.dtype, head)

    def body(carry: None, chunk: tuple[Array, Array]) -> tuple[None, Array]:
        x, targets = chunk
        return carry, _losses(product(x, kernel), targets)[1]

    return _over_chunks(body, None, (x, targets), kernel.shape[1], head)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_cross_entropy(
    x: Float[Array, "B T D"],
    table: Float[Array, "_ _"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    head: Head,
) -> Float[Array, ""]:
    """Sum over tokens of weight times nats, with gradients for `x` and `table`; `weights` as under stop_gradient."""
    return jnp.sum(weights * cross_entropy(x, table, targets, head))


def _forward(x: Array, table: Array, targets: Array, weights: Array, head: Head) -> tuple[Array, tuple[Array, Array]]:
    kernel = _kernel(table, x.dtype, head)
    shape = (head.parts, -1) if head.parts > 1 else (-1,)  # gradients of parts are summed once, after the last chunk
    back = table.astype(x.dtype) if head.tied else transpose(kernel, head.materialize_transposes)

    def body(total: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        loss, dkernel = total
        x, targets, weights = chunk
        chunk_logits = product(x, kernel)
        log_sum, losses = _losses(chunk_logits, targets)
        logits_f32 = chunk_logits.astype(jnp.float32)
        one_hot = jnp.arange(logits_f32.shape[-1], dtype=targets.dtype) == targets[..., None]
        dlogits = (jnp.exp(logits_f32 - log_sum[..., None]) - one_hot) * weights[..., None]
        dlogits = dlogits.astype(x.dtype)
        x_flat, dlogits_flat = (y.reshape(*shape, y.shape[-1]) for y in (x, dlogits))
        # Summed in float32 over chunks; a product of bfloat16 into float32 exists on CPU with materialised transposes
        # only.
        dtype = jnp.float32 if head.materialize_transposes else x.dtype
        dkernel += product(transpose(x_flat, head.materialize_transposes), dlogits_flat, dtype)
        return (loss + jnp.sum(losses * weights), dkernel), product(dlogits, back)

    zero = jnp.zeros((), jnp.float32), jnp.zeros((*shape[:-1], *kernel.shape), jnp.float32)
    (loss, dkernel), dx = _over_chunks(body, zero, (x, targets, weights), kernel.shape[1], head)
    dkernel = dkernel.sum(0) if head.parts > 1 else dkernel
    # The barrier keeps XLA from folding the transpose back into the product.
    return loss, (dx, jax.lax.optimization_barrier(dkernel).T if head.tied else dkernel)


def _backward(head: Head, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array, None, None]:
    dx, dtable = saved
    return dx * dy.astype(dx.dtype), dtable * dy, None, None


weighted_cross_entropy.defvjp(_forward, _backward)


def _kernel(table: Array, dtype: Any, head: Head) -> Array:
    """The table as [D, V] in the dtype of computing."""
    return transpose(table.astype(dtype), head.materialize_transposes) if head.tied else table.astype(dtype)


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
