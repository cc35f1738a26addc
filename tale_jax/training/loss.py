"""Which tokens belong together in a loss. The cross-entropy itself lives with the head, in `model/head.py`."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def document_segments(tokens: Int[Array, "B T"], bos_id: int) -> Int[Array, "B T"]:
    """Numbers the documents in each row: 0 before the first BOS, 1 from there to the next, and so on."""
    return jnp.cumsum(tokens == bos_id, axis=-1, dtype=jnp.int32)
