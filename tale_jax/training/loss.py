"""Which tokens belong together in a loss. The cross-entropy itself lives with the head, in `model/head.py`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def document_segments(tokens: Int[Array, "B T"], bos_id: int) -> Int[Array, "B T"]:
    """Numbers the documents in each row: 0 before the first BOS, 1 from there to the next, and so on."""
    # Not jnp.cumsum: it lowers to a window reduction, which Apple's jax-metal has for pooling only.
    return jax.lax.associative_scan(jnp.add, (tokens == bos_id).astype(jnp.int32), axis=-1)
