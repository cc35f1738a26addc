"""Where text comes from: the embedded tales, WikiText, TinyStories, your own files or a hub dataset.

A *document* is what BOS and EOS will enclose: a tale, an article, a story, a row, a text file or a passage of a long
one. Documents stream (`readers.py`), so a corpus may be larger than memory.

Where a source has no split of its own, a hash of the document's text cuts one: adding files moves no document from one
split to another, and two copies of a text never end up on both sides.

A new dataset is one function and one entry in `OPENERS`, and its name in `CORPORA` of `config.py`.

    from tale_jax.data.corpus import open_corpus
    corpus = open_corpus(config.corpus, config.seed)
    for text in corpus.documents("train"): ...
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tale_jax.config import CorpusConfig
from tale_jax.data import readers

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Source:
    """A stream of documents that can be read again; `num_bytes` is about how much text it holds, None if unknown."""

    read: Callable[[], Iterator[str]]
    num_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """A split: the documents of a source whose hash lies in [low, high), a part of [0, 1)."""

    source: Source
    low: float = 0.0
    high: float = 1.0


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of three splits.

    Attributes:
      identity: what the documents depend on, as JSON: the settings that matter, and names and sizes of the files.
      parts: where each split is read.
      max_train_bytes: reading ends where the training split is full; 0: never.
      words_end_lines: WikiText's convention, in which the end of each line counts as a word (`count_words`).
      nats: -log probability of each document of a split, in order, where the corpus knows it (tales); else None.
    """

    identity: dict[str, Any]
    parts: dict[str, Part]
    max_train_bytes: int = 0
    words_end_lines: bool = False
    nats: Callable[[str], Iterator[float]] | None = None

    def documents(self, split: str) -> Iterator[str]:
        """Streams the documents of "train", "valid" or "test", the same ones in the same order every time.

        Raises:
          ValueError: one line, for an empty split and for text that cannot be read (file, place and reason).
        """
        part, train = self.parts[split], self.parts["train"]
        empty, train_bytes = True, 0
        for text in part.source.read():
            place = _place(text) if part.high - part.low < 1 else 0.0
            if self.max_train_bytes and part.source is train.source and train.low <= place < train.high:
                train_bytes += len(text.encode())
                if train_bytes > self.max_train_bytes:
                    break
            if part.low <= place < part.high:
                empty = False
                yield text
        if empty:
            shown = [f"corpus.{k}={self.identity[k]}" for k in ("name", "path", "hub_name") if self.identity.get(k)]
            share = f", or raise corpus.held_out={self.identity['held_out']}" if part.high - part.low < 1 else ""
            raise ValueError(f"{' '.join(shown)} must hold a document for the {split} split; give more text{share}")

    def num_bytes(self, split: str) -> int | None:
        """About how many bytes of text a split holds, for a progress bar; None when only reading can tell."""
        part = self.parts[split]
        if part.source.num_bytes is None:
            return None
        size = int(part.source.num_bytes * (part.high - part.low))
        return min(size, self.max_train_bytes or size) if split == "train" else size


def open_corpus(config: CorpusConfig, seed: int) -> Corpus:
    """Finds the corpus and checks that it is there, without reading it.

    Args:
      config: the `corpus` settings.
      seed: of the tales; no other corpus depends on it.

    Raises:
      ValueError: one line, for a missing path, library or file.
    """
    return OPENERS[config.name].open(config, seed)


def settings(config: CorpusConfig) -> dict[str, Any]:
    """The settings this corpus depends on. The others may change without changing a document."""
    return {field: getattr(config, field) for field in ("name", *OPENERS[config.name].settings)}


def _open_tales(config: CorpusConfig, seed: int) -> Corpus:
    from tale_jax.data.tales import grammar  # loaded only where tales are told

    def told(split: str) -> Iterator[grammar.Tale]:
        return (grammar.tell(index, split, seed) for index in range(getattr(config, f"num_{split}_tales")))

    first = [grammar.tell(index, "train", seed).text.encode() for index in range(32)]

    def source(split: str) -> Source:
        num_bytes = getattr(config, f"num_{split}_tales") * sum(map(len, first)) // len(first)
        return Source(lambda: (tale.text for tale in told(split)), num_bytes)

    told_digest = hashlib.blake2b(b"\0".join(first), digest_size=16).hexdigest()  # another grammar tells other tales
    return Corpus(
        identity=settings(config) | {"grammar": told_digest},
        parts={split: Part(source(split)) for split in SPLITS},
        nats=lambda split: (-tale.logprob for tale in told(split)),
    )


def _open_wikitext(config: CorpusConfig, seed: int) -> Corpus:
    del seed

    def from_hub(split: str) -> Source:
        variant = "wikitext-2-v1" if config.name == "wikitext2" else "wikitext-103-v1"
        rows = readers.Hub("Salesforce/wikitext", variant, "validation" if split == "valid" else split, "text")
        # A row is a line of the original file, but for its blank lines, " \n", which the hub has emptied.
        return Source(lambda: readers.articles(row or " \n" for row in rows))

    def from_file(path: Path) -> Source:
        return Source(lambda: readers.articles(readers.lines(path)), path.stat().st_size)

    files = {split: _find_split(config, split, ("{}.txt", "wiki.{}.tokens")) for split in SPLITS} if config.path else {}
    sources = {split: from_file(files[split]) if files else from_hub(split) for split in SPLITS}
    return Corpus(
        identity=settings(config) | _fingerprint(list(files.values())),
        parts={split: Part(sources[split]) for split in SPLITS},
        max_train_bytes=config.max_train_bytes,
        words_end_lines=True,
    )


def _open_tinystories(config: CorpusConfig, seed: int) -> Corpus:
    """TinyStories publishes no test split: half of the published validation stories, chosen by hash, are test."""
    del seed
    names = ("TinyStoriesV2-GPT4-{}.txt", "TinyStories-{}.txt", "{}.txt")
    path = Path(config.path).expanduser()
    if not config.path:
        files = []
        train, valid = (_from_hub("roneneldan/TinyStories", "", name, "text") for name in ("train", "validation"))
    else:
        files = [path] if path.is_file() else [_find_split(config, split, names) for split in ("train", "valid")]
        train, valid = (Source(lambda f=f: readers.stories(f), f.stat().st_size) for f in (files[0], files[-1]))
    parts = {"train": Part(train), "valid": Part(valid, 0.0, 0.5), "test": Part(valid, 0.5, 1.0)}
    if len(files) == 1:  # a file of stories without published splits
        parts = _hold_out(train, {}, config.held_out)
    return Corpus(settings(config) | _fingerprint(files), parts, config.max_train_bytes)


def _open_files(config: CorpusConfig, seed: int) -> Corpus:
    del seed
    files = readers.find_files(config.path)
    compressed = any(file.suffix.lower() == ".parquet" for file in files)
    source = Source(
        lambda: itertools.chain.from_iterable(readers.read_file(file, config.field) for file in files),
        None if compressed else sum(file.stat().st_size for file in files),
    )
    identity = settings(config) | _fingerprint(files)
    return Corpus(identity, _hold_out(source, {}, config.held_out), config.max_train_bytes)


def _open_hub(config: CorpusConfig, seed: int) -> Corpus:
    del seed
    names = {"train": config.train_split, "valid": config.valid_split, "test": config.test_split}
    source = functools.partial(_from_hub, config.hub_name, config.hub_config, field=config.field)
    sources = {split: source(name) for split, name in names.items() if name}
    train = sources.pop("train")
    return Corpus(settings(config), _hold_out(train, sources, config.held_out), config.max_train_bytes)


class Opener(NamedTuple):
    """How a corpus is opened, and which settings its documents depend on; the others may change with no harm."""

    open: Callable[[CorpusConfig, int], Corpus]
    settings: tuple[str, ...]


OPENERS = {
    "tales": Opener(_open_tales, ("num_train_tales", "num_valid_tales", "num_test_tales")),
    "wikitext2": Opener(_open_wikitext, ("path", "max_train_bytes")),
    "wikitext103": Opener(_open_wikitext, ("path", "max_train_bytes")),
    "tinystories": Opener(_open_tinystories, ("path", "held_out", "max_train_bytes")),
    "files": Opener(_open_files, ("path", "field", "held_out", "max_train_bytes")),
    "hub": Opener(
        _open_hub,
        (
            "hub_name",
            "hub_config",
            "train_split",
            "valid_split",
            "test_split",
            "field",
            "held_out",
            "max_train_bytes",
        ),
    ),
}


def _from_hub(name: str, config: str, split: str, field: str) -> Source:
    rows = readers.Hub(name, config, split, field)
    return Source(lambda: filter(str.strip, rows))


def _hold_out(train: Source, own: dict[str, Source], held_out: float) -> dict[str, Part]:
    """Parts for every split: those without a source of their own are cut from the training source."""
    missing = [split for split in ("valid", "test") if split not in own]
    parts = {split: Part(train, i * held_out, (i + 1) * held_out) for i, split in enumerate(missing)}
    parts |= {split: Part(source) for split, source in own.items()}
    return parts | {"train": Part(train, len(missing) * held_out, 1.0)}


def _place(text: str) -> float:
    """Where a document falls in [0, 1): a hash of its text and of nothing else."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def _find_split(config: CorpusConfig, split: str, names: tuple[str, ...]) -> Path:
    folder = Path(config.path).expanduser()
    if not folder.exists():
        raise ValueError(f"corpus.path={config.path} does not exist; give the folder that holds {config.name}")
    for name in names:
        if (file := folder / name.format(split)).is_file():
            if not file.stat().st_size:
                raise ValueError(f"corpus.path={config.path}: {file.name} must not be empty; download it again")
            return file
    tried = " or ".join(name.format(split) for name in names)
    raise ValueError(f"corpus.path={config.path} must be a folder that holds {tried}; there is no such file in it")


def _fingerprint(files: list[Path]) -> dict[str, Any]:
    """Number and bytes of the files, and a digest of their names and sizes (hashing contents would read all of it)."""
    if not files:
        return {}
    base = os.path.commonpath([file.absolute().parent for file in files])
    listing = [(file.absolute().relative_to(base).as_posix(), file.stat().st_size) for file in files]
    digest = hashlib.blake2b(json.dumps(listing).encode(), digest_size=16).hexdigest()
    return {"files": len(files), "bytes": sum(size for _, size in listing), "names_and_sizes": digest}
