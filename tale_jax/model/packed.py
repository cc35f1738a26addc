"""What windows of several documents need where none attends to another: of which document a token is, and where."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from tale_jax.data.marks import MARKED, begins_document


def document_segments(tokens: Int[Array, "B T"], bos_id: int) -> Int[Array, "B T"]:
    """Numbers the documents in each row: 0 before the first BOS (or mark), 1 from there to the next, and so on."""
    # Not jnp.cumsum: it lowers to a window reduction, which Apple's jax-metal has for pooling only.
    return jax.lax.associative_scan(jnp.add, begins_document(tokens, bos_id).astype(jnp.int32), axis=-1)


def document_positions(tokens: Int[Array, "B T"], bos_id: int) -> Int[Array, "B T"]:
    """The position of each token in its document, from 0."""
    index = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
    starts = jnp.where(begins_document(tokens, bos_id), index, 0)
    return index - jax.lax.associative_scan(jnp.maximum, starts, axis=-1)


def documents_apart(tokens: Int[Array, "B T"], bos_id: int) -> dict[str, Any]:
    """The arguments of the model that keep attention inside each document. Of tokens with marks, positions too."""
    segments = {"segments": document_segments(tokens, bos_id)}
    return segments | ({"positions": document_positions(tokens, bos_id)} if bos_id <= MARKED else {})
