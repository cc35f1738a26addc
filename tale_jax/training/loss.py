"""Cross-entropy of the next token, without a float32 copy of the logits and with a gradient written by hand.

Automatic differentiation keeps several arrays of the size of the logits, which at this scale are the largest of the
step; the gradient is softmax minus one-hot, and needs only the logits and their log-sum-exp.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def cross_entropy(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Negative log-likelihood of `targets` in nats, in float32, from logits of any float dtype."""
    return _forward(logits, targets)[0]


def _forward(logits: Array, targets: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)).astype(jnp.float32)
    total = jnp.sum(jnp.exp(logits.astype(jnp.float32) - peak), axis=-1)
    log_sum = jnp.log(total) + peak[..., 0]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0].astype(jnp.float32)
    return log_sum - chosen, (logits, targets, log_sum)


def _backward(saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, None]:
    logits, targets, log_sum = saved
    softmax = jnp.exp(logits.astype(jnp.float32) - log_sum[..., None])
    hit = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    return ((softmax - hit) * dy[..., None]).astype(logits.dtype), None


cross_entropy.defvjp(_forward, _backward)


def document_segments(tokens: Int[Array, "B T"], bos_id: int) -> Int[Array, "B T"]:
    """Numbers the documents in each row: 0 before the first BOS, 1 from there to the next, and so on."""
    # Not jnp.cumsum: it lowers to a window reduction, which Apple's jax-metal has for pooling only.
    return jax.lax.associative_scan(jnp.add, (tokens == bos_id).astype(jnp.int32), axis=-1)
