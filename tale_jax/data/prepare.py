"""Documents -> a tokenizer and token windows (`windows.py`) in a workdir, once.

Every file is written under a temporary name and renamed when it is whole, the manifest last. A killed run leaves
whole splits and a temporary file, which the next one clears away and goes on. Windows that were prepared with other
settings are refused, never overwritten.

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

from tale_jax.config import Config
from tale_jax.data.corpus import SPLITS, Corpus, open_corpus, settings
from tale_jax.data.encode import encode
from tale_jax.data.tales.grammar import ratio
from tale_jax.data.token_files import Manifest, document_starts, iter_documents, load_manifest, load_tokens
from tale_jax.data.tokenizer import Tokenizer, check_tokenizer, tokenizer_file, train_tokenizer
from tale_jax.utils.files import atomic_writer
from tale_jax.utils.progress import Progress

MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = 512, 8192  # of a vocabulary that is chosen here
CHARACTERS_FROM = 1 << 21  # bytes of text whose characters are counted
COVERAGE = 0.9995  # share of them that SentencePiece gives pieces of their own


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
    """Makes the tokenizer and the windows of all three splits, or finds them in `workdir`.

    Args:
      config: uses `corpus`, `tokenizer`, `seed` and `model.seq_len`.
      workdir: created when missing.
      log: file that the lines of progress are appended to, besides the bar.

    Raises:
      ValueError: one line: windows of other settings in `workdir`, or a corpus or tokenizer that cannot be used.
      OSError: one line, when `workdir` cannot be written or its disk is full. What was whole before still is.
    """
    with _clear_errors(workdir):
        for name in ("tokenizer", "windows"):
            (workdir / name).mkdir(parents=True, exist_ok=True)
            for stale in (workdir / name).glob("*.partial"):  # of a run that was killed
                stale.unlink()
    present = [split for split in SPLITS if (workdir / "windows" / f"{split}.json").is_file()]
    manifests = {split: load_manifest(workdir, split) for split in present}
    corpus = _open_corpus(config, manifests)
    if corpus and not manifests:
        tokenizer = _write_tokenizer(corpus, config, workdir, log)
    else:
        tokenizer = Tokenizer.load(tokenizer_file(workdir))
    for manifest in manifests.values():
        _check_same(manifest, config, corpus, tokenizer, workdir)
    for split in SPLITS:
        if corpus and split not in manifests:
            manifests[split] = _write_split(corpus, split, tokenizer, config, workdir, log)
    return Prepared(workdir, tokenizer, manifests)


def with_vocab_size(config: Config) -> tuple[Config, str]:
    """The config with as many pieces as suit its training text, and why so many; `tokenizer.path` is left alone."""
    if config.tokenizer.path:
        return config, f"vocabulary {config.tokenizer.vocab_size:,}: that of {config.tokenizer.path}"
    size, characters = 0, collections.Counter[str]()
    for text in open_corpus(config.corpus, config.seed).documents("train"):
        if size < CHARACTERS_FROM:
            characters.update(text)
        size += len(text.encode())
        if size >= MAX_VOCAB_SIZE**2:  # more text would change nothing
            break
    pieces = suitable_vocab_size(size, characters)
    tokenizer = dataclasses.replace(config.tokenizer, vocab_size=pieces)
    more = " or more" if size >= MAX_VOCAB_SIZE**2 else ""
    return dataclasses.replace(config, tokenizer=tokenizer), f"vocabulary {pieces:,}: {size / 1e6:.1f} MB{more} of text"


def suitable_vocab_size(num_bytes: int, characters: Mapping[str, int]) -> int:
    """A vocabulary for so much text: about the square root of its bytes, a power of two.

    Each piece is then met a few hundred times, whatever the amount. `characters` are counts: besides the bytes and a
    piece for each usual character there is room for as many that are longer.
    """
    pieces = 2 ** round(math.log2(max(1, num_bytes)) / 2)
    pieces = min(max(pieces, MIN_VOCAB_SIZE), MAX_VOCAB_SIZE)
    rest, distinct = (1 - COVERAGE) * sum(characters.values()), len(characters)
    for count in sorted(characters.values()):
        rest -= count
        if rest < 0:
            break
        distinct -= 1
    while pieces < 256 + 2 * distinct:
        pieces *= 2
    return pieces


def _open_corpus(config: Config, manifests: dict[str, Manifest]) -> Corpus | None:
    """The corpus; None when it is gone (or the workdir was copied elsewhere) and everything of it is prepared."""
    try:
        return open_corpus(config.corpus, config.seed)
    except ValueError:
        wanted = settings(config.corpus).items()
        if len(manifests) == len(SPLITS) and all(wanted <= manifest.corpus.items() for manifest in manifests.values()):
            return None
        raise


def _check_same(manifest: Manifest, config: Config, corpus: Corpus | None, tokenizer: Tokenizer, workdir: Path) -> None:
    """Raises ValueError, in one line, with the first thing in which the windows are not those of `config`."""
    if config.model.seq_len > manifest.window_len:
        raise ValueError(
            f"model.seq_len={config.model.seq_len} must not exceed the windows of {manifest.window_len} tokens that "
            f"{workdir} was prepared with; try model.seq_len={manifest.window_len}, or a new --workdir"
        )
    now, then = settings(config.corpus), manifest.corpus
    pairs = {f"corpus.{name}": (value, then.get(name)) for name, value in now.items() if name != "path"}
    pairs |= {"seed": (config.seed, manifest.seed)}
    for name, value in dataclasses.asdict(config.tokenizer).items():
        pairs[f"tokenizer.{name}"] = (value, manifest.tokenizer_settings[name])
    remedy = f"choose a new --workdir, or remove {workdir}/windows to prepare again"
    for field, (value, old) in pairs.items():
        if value != old:
            raise ValueError(f"{field}={value} must be {old}, as in the windows prepared in {workdir}; {remedy}")
    found = corpus.identity if corpus else {}
    for name in found:
        if name not in now and found[name] != then.get(name):  # a folder may have another name, but not other files
            field = f"corpus.path={config.corpus.path}" if config.corpus.path else f"corpus.name={config.corpus.name}"
            change = f"{name} was {then.get(name)} and is {found[name]}"
            raise ValueError(f"{field} must be as it was when {workdir} was prepared, but {change}; {remedy}")
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
    with _clear_errors(workdir), atomic_writer(tokenizer_file(workdir)) as file:
        file.write(tokenizer.model)
    return tokenizer


def _write_split(
    corpus: Corpus, split: str, tokenizer: Tokenizer, config: Config, workdir: Path, log: Path | None
) -> Manifest:
    path = workdir / "windows" / f"{split}.bin"
    documents = words = num_bytes = size = 0
    with _clear_errors(workdir):
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
        with atomic_writer(path.with_suffix(".json")) as file:
            file.write((json.dumps(dataclasses.asdict(manifest), indent=2) + "\n").encode())
    return manifest


def _entropy(corpus: Corpus, split: str, tokens: np.ndarray, tokenizer: Tokenizer) -> dict[str, float]:
    """Nats of a split's documents by the corpus's own probabilities: below this no model's loss on them can stay."""
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
def _clear_errors(workdir: Path) -> Iterator[None]:
    """Disk trouble in one line that names the workdir."""
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
