"""Tokens of 32 bits that carry two marks: whether a token is learned, and whether a document begins with it.

    bit 30    learned: it counts in the loss as a target
    bit 29    first: a document or a conversation begins here
    the rest  the id

Without marks (16 bits, the usual case) both are told from the ids: a document begins with BOS, and all but BOS counts.
That is not enough where BOS ends documents too, as in GPT-2's and SmolLM2's vocabularies, and where only the
assistant's turns of a conversation are learned. So every stream of 32-bit tokens has marks. What reads tokens takes a
`bos_id`, which is `MARKED` (or `ALL_LEARNED`) where they do. All of it works on numpy's arrays and on JAX's.
"""

from typing import Any

import numpy as np

LEARNED, FIRST = 1 << 30, 1 << 29
MAX_VOCAB_SIZE = FIRST
MARKED = -2  # in the place of BOS's id: the tokens have marks
ALL_LEARNED = -3  # the same, and every token but the first of a document counts
DTYPE = np.dtype("<u4")


def has_marks(tokens: Any) -> bool:
    """Whether the tokens of a stream on disk carry marks."""
    return tokens.dtype == DTYPE


def bos_or_marked(tokens: Any, bos_id: int) -> int:
    """What to read a stream on disk by."""
    return MARKED if has_marks(tokens) else bos_id


def token_ids(tokens: Any, bos_id: int) -> Any:
    """The ids alone."""
    return tokens & (FIRST - 1) if bos_id <= MARKED else tokens


def begins_document(tokens: Any, bos_id: int) -> Any:
    """Where documents begin."""
    return (tokens & FIRST) != 0 if bos_id <= MARKED else tokens == bos_id


def is_learned(tokens: Any, bos_id: int) -> Any:
    """Which tokens count as targets. BOS carries no text, so it does not."""
    if bos_id == MARKED:
        return (tokens & LEARNED) != 0
    return (tokens & FIRST) == 0 if bos_id == ALL_LEARNED else tokens != bos_id


def marked(ids: Any, bos_id: int) -> np.ndarray:
    """A stream whose documents begin with BOS, and with nothing else that has its id, with marks."""
    first = np.asarray(ids) == bos_id
    return np.where(first, FIRST, LEARNED).astype(DTYPE) | np.asarray(ids).astype(DTYPE)
