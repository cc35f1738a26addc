"""Token files: the tokens of a prepared split on disk, and the manifest that says what they are.

    workdir/windows/{train,valid,test}.bin     for each document BOS, its tokens, EOS: one flat stream
    workdir/windows/{train,valid,test}.json    the manifest: what was read, with which tokenizer, and how much of it

Window i of length T is tokens[i*T : i*T+T+1], inputs and targets one token apart, so that every token but the first is
predicted exactly once. The file is memory-mapped: it may be larger than memory, and a position in it is one integer.
The manifest has a digest of the file and one of its own; a process holds each file against it before it reads it, once.

    tokens, manifest = load_tokens(workdir, "valid")
"""

import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from tale_jax.data.marks import begins_document, bos_or_marked, has_marks, marked, token_ids
from tale_jax.data.tokenizer import Tokenizer, tokenizer_file
from tale_jax.utils.files import check_inside, write_atomically
from tale_jax.utils.manifests import digest_of, hash_file

FORMAT_VERSION = 2
MAX_MANIFEST_BYTES = 1 << 24  # of a corpus of very many files
DTYPES = ("<u2", "<u4")  # of token ids
ENTROPY = {f"nats_per_{unit}{end}" for unit in ("tale", "byte", "token") for end in ("", "_stderr")} | {"nats"}


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
      sha256: of the token stream; "" where version 1 wrote the manifest, which had none.
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
    sha256: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def known_as(self) -> tuple[str, ...]:
        """The digests of this token stream and of those it took the place of."""
        return (self.sha256, *(str(old.get("sha256", "")) for old in self.replaced))


def save_manifest(workdir: Path, manifest: Manifest) -> None:
    """Writes `windows/SPLIT.json`, with a digest of its own, whole or not at all."""
    values = dataclasses.asdict(manifest)
    text = json.dumps(values | {"digest": digest_of(values)}, indent=2)
    write_atomically(workdir / "windows" / f"{manifest.split}.json", text + "\n")


def seal_tokens(workdir: Path, manifest: Manifest) -> Manifest:
    """Gives a split that version 1 wrote, without a digest, the one that its token stream has now."""
    digest = tokens_digest(workdir / "windows" / f"{manifest.split}.bin")
    manifest = dataclasses.replace(manifest, sha256=digest, format_version=FORMAT_VERSION)
    save_manifest(workdir, manifest)
    return manifest


def load_manifest(workdir: Path, split: str) -> Manifest:
    """The manifest of a prepared split. Raises ValueError, in one line, when it is missing, damaged, or of a version
    that is not known."""
    path = workdir / "windows" / f"{split}.json"
    if not path.is_file():
        raise ValueError(f"workdir={workdir} has no prepared {split} split; run launch/prepare.py on it first")
    check_inside(workdir, path, MAX_MANIFEST_BYTES)
    try:
        values = json.loads(path.read_text())
        version = values["format_version"]
        if version in (1, FORMAT_VERSION):
            digest = values.pop("digest", None)
            if version != 1 and digest_of(values) != digest:
                raise ValueError("its digest does not fit")
            _check_values(values, split)
            return Manifest(**values)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {path.parent} and prepare again") from None
    raise ValueError(f"{path} must have format_version={FORMAT_VERSION}; remove {path.parent} and prepare again")


def _check_values(values: dict[str, Any], split: str) -> None:
    """Raises ValueError for values that no split has: what a file says is not to be believed."""
    for field in dataclasses.fields(Manifest):
        value, kind = values.get(field.name), typing.get_origin(field.type) or field.type
        if kind in (str, int, bool, dict, list) and field.name in values and type(value) is not kind:
            raise ValueError(f"{field.name} has a value that cannot be")
    counts = [values.get(name, 0) for name in ("documents", "words", "bytes", "tokens", "texts", "window_len")]
    if not all(0 <= count < 1 << 62 for count in counts):
        raise ValueError("it counts what cannot be")
    if values["dtype"] not in DTYPES or values["split"] != split or "name" not in values["corpus"]:
        raise ValueError("it is not of this split, or names no corpus or no dtype of token ids")
    entropy, seen = values.get("entropy", {}), values.get("seen_share")
    numbers = [*entropy.values(), *([] if seen is None else [seen])]
    is_whole = not entropy or entropy.keys() >= ENTROPY
    if not is_whole or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise ValueError("entropy or seen_share has a value that cannot be")
    if not all(isinstance(old, dict) for old in values.get("replaced", [])):
        raise ValueError("replaced has a value that cannot be")


def load_tokens(workdir: Path, split: str) -> tuple[Integer[np.ndarray, " N"], Manifest]:
    """The tokens [N] of a prepared split, memory-mapped and read-only, and its manifest.

    Raises:
      ValueError: one line, when the split was not prepared or its file is damaged.
    """
    manifest = load_manifest(workdir, split)
    check_tokens(workdir, manifest)
    tokens = np.memmap(workdir / "windows" / f"{split}.bin", np.dtype(manifest.dtype), mode="r")
    if has_marks(tokens) and not manifest.has_marks:
        tokens = marked(tokens, Tokenizer.load(tokenizer_file(workdir)).bos_id)
    return tokens, manifest


_checked: dict[tuple[str, int, int, int], str] = {}  # path, size, change and number of a file → its digest


def check_tokens(workdir: Path, manifest: Manifest) -> None:
    """Holds a token stream against its manifest; a process reads a file that stays as it is only once.

    Raises ValueError, in one line, when it is missing or damaged.
    """
    path, size = workdir / "windows" / f"{manifest.split}.bin", 0
    wanted = manifest.tokens * np.dtype(manifest.dtype).itemsize
    if path.is_file():
        check_inside(workdir, path)
        size = path.stat().st_size
    remedy = f"remove {path.with_suffix('.json')} and prepare again"
    if size != wanted or not size:
        raise ValueError(f"{path} must have {wanted} bytes, but has {size}; {remedy}")
    if manifest.sha256 and tokens_digest(path) != manifest.sha256:
        raise ValueError(f"{path} is damaged: its digest is not that of its manifest; {remedy}")


def tokens_digest(path: Path, known: str = "") -> str:
    """The SHA-256 sum of a token stream; about a second for each gigabyte, once a process.

    `known`: the sum that another process of this run has found, which this one then takes.
    """
    status = path.stat()
    key = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
    if key not in _checked:
        _checked[key] = known or hash_file(path.resolve())[0]
    return _checked[key]


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
        document = token_ids(tokens[start:end], bos_or_marked(tokens, tokenizer.bos_id)).tolist()
        if max(document) >= tokenizer.vocab_size:
            raise ValueError(f"the windows hold token {max(document)}, which the tokenizer lacks; prepare again")
        yield tokenizer.decode(document)
