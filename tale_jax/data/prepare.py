"""Documents → a tokenizer and token files (`token_files.py`) in a workdir, once.

Every file is written under a temporary name and renamed when it is whole, the manifest last. A killed run leaves whole
splits and a temporary file; the next run removes that file and prepares what is missing. Token files that were made
with other settings are refused, never overwritten.

    python launch/prepare.py --config=configs/tales.py --workdir=experiments/tales
"""

import collections
import dataclasses
import errno
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from tale_jax.config import Config, change
from tale_jax.data.corpus import SPLITS, Corpus, open_corpus, relevant_settings
from tale_jax.data.encode import encode
from tale_jax.data.tales.grammar import ratio
from tale_jax.data.token_files import Manifest, document_starts, iter_documents, load_manifest, load_tokens
from tale_jax.data.tokenizer import JSON_FILE, Tokenizer, check_tokenizer, tokenizer_file, train_tokenizer
from tale_jax.utils.files import atomic_writer, write_atomically
from tale_jax.utils.progress import Progress

MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = 512, 8192  # of a vocabulary that is chosen here
CHARACTER_SAMPLE_BYTES = 1 << 21  # text whose characters are counted
CHARACTER_COVERAGE = 0.9995  # share of those characters that SentencePiece gives a token of their own


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` leaves in a workdir."""

    workdir: Path
    tokenizer: Tokenizer
    manifests: dict[str, Manifest]

    def tokens(self, split: str) -> Integer[np.ndarray, " N"]:
        """The token stream of a split, mapped into memory, read-only."""
        return load_tokens(self.workdir, split)[0]


def prepare(config: Config, workdir: Path, log: Path | None = None) -> Prepared:
    """The tokenizer and the token files of all three splits, made where `workdir` lacks them.

    Args:
      config: uses `corpus`, `tokenizer`, `seed` and `model.seq_len`.
      workdir: created when missing. One that is prepared is only read.
      log: file that the lines of progress are appended to.

    Raises:
      ValueError: one line, for token files of other settings in `workdir`, or a corpus or tokenizer that cannot be
        used.
      OSError: one line, when `workdir` cannot be written or its disk is full. Splits that were whole still are.
    """
    present = [split for split in SPLITS if (workdir / "windows" / f"{split}.json").is_file()]
    if len(present) < len(SPLITS):
        with _disk_errors_explained(workdir):
            for name in ("tokenizer", "windows"):
                (workdir / name).mkdir(parents=True, exist_ok=True)
                for partial in (workdir / name).glob("*.partial"):  # of a run that was killed
                    partial.unlink()
    manifests = {split: load_manifest(workdir, split) for split in present}
    corpus = _open_corpus(config, manifests)
    brought = tokenizer_file(workdir).name == JSON_FILE  # by a model from elsewhere: it stays
    if corpus and not manifests and not brought:
        tokenizer = _write_tokenizer(corpus, config, workdir, log)
    else:
        tokenizer = Tokenizer.load(tokenizer_file(workdir))
    if brought and tokenizer.vocab_size > config.tokenizer.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={config.tokenizer.vocab_size} must be that of {tokenizer_file(workdir)}; "
            f"try tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    for manifest in manifests.values():
        _check_settings(manifest, config, corpus, tokenizer, workdir)
    for split in SPLITS:
        if corpus and split not in manifests:
            manifests[split] = _write_split(corpus, split, tokenizer, config, workdir, log)
    return Prepared(workdir, tokenizer, manifests)


def with_vocab_size(config: Config) -> tuple[Config, str]:
    """The config with a vocabulary that suits its training text, and the reason in words; one of `tokenizer.path` is
    kept."""
    if config.tokenizer.path:
        return config, f"vocabulary {config.tokenizer.vocab_size:,}: that of {config.tokenizer.path}"
    size, characters = 0, collections.Counter[str]()
    for text in open_corpus(config.corpus, config.seed).documents("train"):
        if size < CHARACTER_SAMPLE_BYTES:
            characters.update(text)
        size += len(text.encode())
        if size >= MAX_VOCAB_SIZE**2:  # more text would change nothing
            break
    vocab_size = suitable_vocab_size(size, characters)
    more = " or more" if size >= MAX_VOCAB_SIZE**2 else ""
    reason = f"vocabulary {vocab_size:,}: {size / 1e6:.1f} MB{more} of text"
    return change(config, {"tokenizer.vocab_size": vocab_size}), reason


def suitable_vocab_size(num_bytes: int, characters: Mapping[str, int]) -> int:
    """A vocabulary for `num_bytes` of text: about the square root of it, and a power of two.

    The text then has a few hundred examples of each token, however long it is. `characters` counts characters: there is
    room for the 256 bytes, a token for each character that is not rare, and as many longer tokens.
    """
    vocab_size = 2 ** round(math.log2(max(1, num_bytes)) / 2)
    vocab_size = min(max(vocab_size, MIN_VOCAB_SIZE), MAX_VOCAB_SIZE)
    uncovered, num_covered = (1 - CHARACTER_COVERAGE) * sum(characters.values()), len(characters)
    for count in sorted(characters.values()):
        uncovered -= count
        if uncovered < 0:
            break
        num_covered -= 1
    while vocab_size < 256 + 2 * num_covered:
        vocab_size *= 2
    return vocab_size


def _open_corpus(config: Config, manifests: dict[str, Manifest]) -> Corpus | None:
    """The corpus; None when it is gone (as where a workdir was copied to) and all splits are prepared."""
    try:
        return open_corpus(config.corpus, config.seed)
    except ValueError:
        wanted = relevant_settings(config.corpus).items()
        if len(manifests) == len(SPLITS) and all(wanted <= manifest.corpus.items() for manifest in manifests.values()):
            return None
        raise


def _check_settings(
    manifest: Manifest, config: Config, corpus: Corpus | None, tokenizer: Tokenizer, workdir: Path
) -> None:
    """Raises ValueError, in one line, with the first setting or file that is not as it was when the split was made."""
    if config.model.seq_len > manifest.window_len:
        raise ValueError(
            f"model.seq_len={config.model.seq_len} must not exceed the windows of {manifest.window_len} tokens that "
            f"{workdir} was prepared with; try model.seq_len={manifest.window_len}, or a new --workdir"
        )
    settings, old = relevant_settings(config.corpus), manifest.corpus
    pairs = {f"corpus.{name}": (value, old.get(name)) for name, value in settings.items() if name != "path"}
    pairs |= {"seed": (config.seed, manifest.seed)}
    for name, value in dataclasses.asdict(config.tokenizer).items():
        pairs[f"tokenizer.{name}"] = (value, manifest.tokenizer_settings[name])
    remedy = f"choose a new --workdir, or remove {workdir}/windows to prepare again"
    for field, (value, old_value) in pairs.items():
        if value != old_value:
            raise ValueError(f"{field}={value} must be {old_value}, as in the windows prepared in {workdir}; {remedy}")
    files = {name: value for name, value in (corpus.identity if corpus else {}).items() if name not in settings}
    for name, value in files.items():  # the folder may have another name, but not other files
        if value != old.get(name):
            field = f"corpus.path={config.corpus.path}" if config.corpus.path else f"corpus.name={config.corpus.name}"
            difference = f"{name} was {old.get(name)} and is {value}"
            raise ValueError(f"{field} must be as it was when {workdir} was prepared, but {difference}; {remedy}")
    if tokenizer.fingerprint != manifest.tokenizer:
        raise ValueError(f"{workdir}/tokenizer must be the one that {workdir}/windows was prepared with; {remedy}")


def _write_tokenizer(corpus: Corpus, config: Config, workdir: Path, log: Path | None) -> Tokenizer:
    if config.tokenizer.path:
        tokenizer = Tokenizer.load(Path(config.tokenizer.path).expanduser())
        check_tokenizer(tokenizer, config.tokenizer)
    else:
        with Progress(
            "read for the tokenizer", total=corpus.num_bytes("train") or 0, unit="bytes", log=log
        ) as progress:

            def documents() -> Iterator[str]:
                for text in corpus.documents("train"):
                    yield text
                    progress.advance(len(text.encode()))

            tokenizer = train_tokenizer(documents(), config.tokenizer)
    with _disk_errors_explained(workdir):
        tokenizer.save(workdir / "tokenizer")
    return tokenizer


def _write_split(
    corpus: Corpus, split: str, tokenizer: Tokenizer, config: Config, workdir: Path, log: Path | None
) -> Manifest:
    path = workdir / "windows" / f"{split}.bin"
    documents = words = num_bytes = size = 0
    with _disk_errors_explained(workdir):
        with (
            Progress(f"prepare {split}", total=corpus.num_bytes(split) or 0, unit="bytes", log=log) as progress,
            atomic_writer(path) as file,
        ):
            for batch in encode(corpus.documents(split), tokenizer, corpus.num_bytes(split), corpus.words_end_lines):
                size += file.write(batch.tokens)
                documents += batch.documents
                words += batch.words
                num_bytes += batch.num_bytes
                progress.advance(batch.num_bytes)
        manifest = Manifest(
            split=split,
            corpus=corpus.identity,
            seed=config.seed,
            tokenizer=tokenizer.fingerprint,
            tokenizer_settings=dataclasses.asdict(config.tokenizer),
            window_len=config.model.seq_len,
            dtype=tokenizer.dtype.str,
            documents=documents,
            words=words,
            bytes=num_bytes,
            tokens=size // tokenizer.dtype.itemsize,
            entropy=_entropy(corpus, split, np.memmap(path, tokenizer.dtype, mode="r"), tokenizer),
        )
        write_atomically(path.with_suffix(".json"), json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
    return manifest


def _entropy(corpus: Corpus, split: str, tokens: np.ndarray, tokenizer: Tokenizer) -> dict[str, float]:
    """`Manifest.entropy`: nats of a split's documents by the corpus's own probabilities, the lowest possible loss."""
    if corpus.nats is None or split == "train":
        return {}
    nats = np.fromiter(corpus.nats(split), np.float64)
    entropy = {"nats": float(nats.sum())}
    sizes = {
        "tale": np.ones(len(nats)),
        "byte": np.array([len(text.encode()) for text in iter_documents(tokens, tokenizer)]),
        "token": np.diff(document_starts(tokens, tokenizer.bos_id), append=len(tokens)) - 1,
    }
    for unit, size in sizes.items():
        entropy[f"nats_per_{unit}"], entropy[f"nats_per_{unit}_stderr"] = ratio(nats.tolist(), size.tolist())
    return entropy


@contextmanager
def _disk_errors_explained(workdir: Path) -> Iterator[None]:
    """Raises a full or read-only disk as an error of one line that names the workdir."""
    try:
        yield
    except OSError as error:
        if error.filename and not Path(error.filename).is_relative_to(workdir):
            raise  # it is the corpus that cannot be read
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"workdir={workdir}: the disk is full; make room, or choose another --workdir") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise OSError(f"workdir={workdir} cannot be written to ({error}); choose another --workdir") from None
        raise
