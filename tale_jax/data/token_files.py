"""Token files: the tokens of a prepared split on disk, and the manifest that says what they are.

    workdir/windows/{train,valid,test}.bin     for each document BOS, its tokens, EOS: one flat stream
    workdir/windows/{train,valid,test}.json    the manifest: what was read, with which tokenizer, and how much of it

Window i of length T is tokens[i*T : i*T+T+1], inputs and targets one token apart, so that every token but the first is
predicted exactly once. The file is memory-mapped: it may be larger than memory, and a position in it is one integer.

    tokens, manifest = load_tokens(workdir, "valid")
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from tale_jax.data.marks import begins_document, bos_or_marked, has_marks, marked, token_ids
from tale_jax.data.tokenizer import Tokenizer, tokenizer_file

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a prepared split is.

    Attributes:
      corpus: settings of the corpus, and digests of its files (`Corpus.identity`).
      seed: of the run.
      tokenizer: SHA-256 of the model file; tokenizer_settings: the settings it was made with.
      window_len: model.seq_len at the time: windows of any length up to it may be read.
      dtype: of the tokens, as numpy writes it; those of 32 bits have marks (`marks.py`).
      documents, words, bytes, tokens: counts; tokens include BOS and EOS.
      entropy: for the held-out tales, by the probabilities of their grammar: `nats_per_tale`, `nats_per_byte` and
        `nats_per_token` (EOS counted, BOS not), for each its standard error over tales (`nats_per_tale_stderr`, …), and
        the sum `nats`; empty for other text.
      texts: files, or rows of files, that the documents are (passages of); 0: as many as documents.
      seen_share: of a held-out split: the share of its runs of 50 bytes that occur in the training split; None where
        that is unknown.
      chat: of conversations: rows, learned tokens, truncated (sequences that no window of the context holds whole), and
        the digest of the template; empty for text.
      has_marks: whether 32-bit tokens do; not those of tale_jax 0.1.
      replaced: summaries of earlier texts that this one took the place of (`corpus.changed`), the oldest first.
    """

    split: str
    corpus: dict[str, Any]
    seed: int
    tokenizer: str
    tokenizer_settings: dict[str, Any]
    window_len: int
    dtype: str
    documents: int = 0
    words: int = 0
    bytes: int = 0
    tokens: int = 0
    entropy: dict[str, float] = dataclasses.field(default_factory=dict)
    texts: int = 0
    seen_share: float | None = None
    replaced: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    chat: dict[str, Any] = dataclasses.field(default_factory=dict)
    has_marks: bool = False
    format_version: int = FORMAT_VERSION


def load_manifest(workdir: Path, split: str) -> Manifest:
    """The manifest of a prepared split. Raises ValueError, in one line, when it is missing or of another version."""
    path = workdir / "windows" / f"{split}.json"
    if not path.is_file():
        raise ValueError(f"workdir={workdir} has no prepared {split} split; run launch/prepare.py on it first")
    try:
        values = json.loads(path.read_text())
        if values["format_version"] == FORMAT_VERSION:
            return Manifest(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and prepare again") from None
    raise ValueError(f"{path} must have format_version={FORMAT_VERSION}; remove {path.parent} and prepare again")


def load_tokens(workdir: Path, split: str) -> tuple[Integer[np.ndarray, " N"], Manifest]:
    """The tokens [N] of a prepared split, memory-mapped and read-only, and its manifest.

    Raises:
      ValueError: one line, when the split was not prepared or its file is damaged.
    """
    manifest = load_manifest(workdir, split)
    path, dtype = workdir / "windows" / f"{split}.bin", np.dtype(manifest.dtype)
    size = path.stat().st_size if path.is_file() else 0
    if size != manifest.tokens * dtype.itemsize:
        raise ValueError(
            f"{path} must have {manifest.tokens * dtype.itemsize} bytes, but has {size}; "
            f"remove {path.with_suffix('.json')} and prepare again"
        )
    tokens = np.memmap(path, dtype, mode="r")
    if has_marks(tokens) and not manifest.has_marks:
        tokens = marked(tokens, Tokenizer.load(tokenizer_file(workdir)).bos_id)
    return tokens, manifest


def document_starts(
    tokens: Integer[np.ndarray, " N"], bos_id: int, block: int = 1 << 22
) -> Int64[np.ndarray, " documents"]:
    """Where documents begin in a token stream, which is read a block at a time: at BOS, or where a mark says so."""
    bos_id = bos_or_marked(tokens, bos_id)
    blocks = range(0, len(tokens), block)
    return np.concatenate(
        [start + np.flatnonzero(begins_document(tokens[start : start + block], bos_id)) for start in blocks]
    )


def iter_documents(tokens: Integer[np.ndarray, " N"], tokenizer: Tokenizer) -> Iterator[str]:
    """The texts of a token stream, in order."""
    starts = document_starts(tokens, tokenizer.bos_id).tolist()
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        yield tokenizer.decode(token_ids(tokens[start:end], bos_or_marked(tokens, tokenizer.bos_id)).tolist())
