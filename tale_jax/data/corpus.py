"""Where text comes from: the embedded tales, WikiText, TinyStories, your own files or a hub dataset.

A *document* is what BOS and EOS will enclose: a tale, an article, a story, a row, a text file or a passage of a long
one. Documents stream (`readers.py`), so a corpus may be larger than memory.

Where a source has no published split, one is made by a hash of each document's text: adding files moves no document
from one split to another, and two copies of a text are always in the same split.

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
    """A stream of documents that can be read many times; `num_bytes`: about how much text it has, None if unknown."""

    read: Callable[[], Iterator[str]]
    num_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class SplitSource:
    """Where a split is read: the documents of a source whose hash (`_hash_position`) lies in [low, high)."""

    source: Source
    low: float = 0.0
    high: float = 1.0


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of three splits.

    Attributes:
      identity: what the documents depend on, as JSON: the settings that matter, and names and sizes of the files.
      splits: where each split is read.
      max_train_bytes: reading ends where the training split has so many bytes of text; 0: never.
      words_end_lines: WikiText's convention, in which the end of each line counts as a word (`count_words`).
      nats: -log probability of each document of a split, in order, where the corpus knows it (tales); else None.
    """

    identity: dict[str, Any]
    splits: dict[str, SplitSource]
    max_train_bytes: int = 0
    words_end_lines: bool = False
    nats: Callable[[str], Iterator[float]] | None = None

    def documents(self, split: str) -> Iterator[str]:
        """Streams the documents of "train", "valid" or "test", the same ones in the same order every time.

        Raises:
          ValueError: one line, for an empty split and for text that cannot be read (file, place and reason).
        """
        wanted, train = self.splits[split], self.splits["train"]
        by_hash = wanted.high - wanted.low < 1
        empty, train_bytes = True, 0
        for text in wanted.source.read():
            position = _hash_position(text) if by_hash else 0.0
            if self.max_train_bytes and wanted.source is train.source and train.low <= position < train.high:
                train_bytes += len(text.encode())
                if train_bytes > self.max_train_bytes:
                    break
            if wanted.low <= position < wanted.high:
                empty = False
                yield text
        if empty:
            fields = [f"corpus.{k}={self.identity[k]}" for k in ("name", "path", "hub_name") if self.identity.get(k)]
            or_raise = f", or raise corpus.held_out={self.identity['held_out']}" if by_hash else ""
            raise ValueError(f"{' '.join(fields)} must hold a document for the {split} split; give more text{or_raise}")

    def num_bytes(self, split: str) -> int | None:
        """About how many bytes of text a split has, for a progress bar; None when only reading can tell."""
        wanted = self.splits[split]
        if wanted.source.num_bytes is None:
            return None
        size = int(wanted.source.num_bytes * (wanted.high - wanted.low))
        return min(size, self.max_train_bytes or size) if split == "train" else size


def open_corpus(config: CorpusConfig, seed: int) -> Corpus:
    """The corpus that the settings name; its files are looked for, but not read.

    Args:
      config: the `corpus` settings.
      seed: of the tales; no other corpus depends on it.

    Raises:
      ValueError: one line, for a missing path, library or file.
    """
    return OPENERS[config.name].open(config, seed)


def relevant_settings(config: CorpusConfig) -> dict[str, Any]:
    """The settings that the documents of this corpus depend on."""
    return {field: getattr(config, field) for field in ("name", *OPENERS[config.name].settings)}


def _open_tales(config: CorpusConfig, seed: int) -> Corpus:
    from tale_jax.data.tales import grammar  # its tables are built only where tales are told

    def tales(split: str) -> Iterator[grammar.Tale]:
        return (grammar.tell(index, split, seed) for index in range(getattr(config, f"num_{split}_tales")))

    first_tales = [grammar.tell(index, "train", seed).text.encode() for index in range(32)]

    def source(split: str) -> Source:
        num_bytes = getattr(config, f"num_{split}_tales") * sum(map(len, first_tales)) // len(first_tales)
        return Source(lambda: (tale.text for tale in tales(split)), num_bytes)

    # Another version of the grammar tells other tales.
    grammar_digest = hashlib.blake2b(b"\0".join(first_tales), digest_size=16).hexdigest()
    return Corpus(
        identity=relevant_settings(config) | {"grammar": grammar_digest},
        splits={split: SplitSource(source(split)) for split in SPLITS},
        nats=lambda split: (-tale.logprob for tale in tales(split)),
    )


def _open_wikitext(config: CorpusConfig, seed: int) -> Corpus:
    del seed

    def from_hub(split: str) -> Source:
        variant = "wikitext-2-v1" if config.name == "wikitext2" else "wikitext-103-v1"
        rows = readers.HubRows("Salesforce/wikitext", variant, "validation" if split == "valid" else split, "text")
        # A row is a line of the original file; only the blank lines, " \n", are empty on the hub.
        return Source(lambda: readers.articles(row or " \n" for row in rows))

    def from_file(path: Path) -> Source:
        return Source(lambda: readers.articles(readers.lines(path)), path.stat().st_size)

    files = {split: _find_split(config, split, ("{}.txt", "wiki.{}.tokens")) for split in SPLITS} if config.path else {}
    sources = {split: from_file(files[split]) if files else from_hub(split) for split in SPLITS}
    return Corpus(
        identity=relevant_settings(config) | _fingerprint(list(files.values())),
        splits={split: SplitSource(sources[split]) for split in SPLITS},
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
    splits = {"train": SplitSource(train), "valid": SplitSource(valid, 0.0, 0.5), "test": SplitSource(valid, 0.5, 1.0)}
    if len(files) == 1:  # a file of stories without published splits
        splits = _hold_out(train, {}, config.held_out)
    return Corpus(relevant_settings(config) | _fingerprint(files), splits, config.max_train_bytes)


def _open_files(config: CorpusConfig, seed: int) -> Corpus:
    del seed
    files = readers.find_files(config.path)
    compressed = any(file.suffix.lower() == ".parquet" for file in files)
    source = Source(
        lambda: itertools.chain.from_iterable(readers.read_file(file, config.field) for file in files),
        None if compressed else sum(file.stat().st_size for file in files),
    )
    identity = relevant_settings(config) | _fingerprint(files)
    return Corpus(identity, _hold_out(source, {}, config.held_out), config.max_train_bytes)


def _open_hub(config: CorpusConfig, seed: int) -> Corpus:
    del seed
    names = {"train": config.train_split, "valid": config.valid_split, "test": config.test_split}
    source = functools.partial(_from_hub, config.hub_name, config.hub_config, field=config.field)
    sources = {split: source(name) for split, name in names.items() if name}
    train = sources.pop("train")
    return Corpus(relevant_settings(config), _hold_out(train, sources, config.held_out), config.max_train_bytes)


class Opener(NamedTuple):
    """How a corpus is opened, and the settings that its documents depend on; another value of the others is no harm."""

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
    rows = readers.HubRows(name, config, split, field)
    return Source(lambda: filter(str.strip, rows))


def _hold_out(train: Source, published: dict[str, Source], held_out: float) -> dict[str, SplitSource]:
    """All three splits: those that are not published are a share `held_out` of the training source, by hash."""
    missing = [split for split in ("valid", "test") if split not in published]
    splits = {split: SplitSource(train, i * held_out, (i + 1) * held_out) for i, split in enumerate(missing)}
    splits |= {split: SplitSource(source) for split, source in published.items()}
    return splits | {"train": SplitSource(train, len(missing) * held_out, 1.0)}


def _hash_position(text: str) -> float:
    """The hash of a document's text, as a number in [0, 1)."""
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
    """Number and bytes of the files, and a digest of their names and sizes (one of the contents would read it all)."""
    if not files:
        return {}
    base = os.path.commonpath([file.absolute().parent for file in files])
    listing = [(file.absolute().relative_to(base).as_posix(), file.stat().st_size) for file in files]
    digest = hashlib.blake2b(json.dumps(listing).encode(), digest_size=16).hexdigest()
    return {"files": len(files), "bytes": sum(size for _, size in listing), "names_and_sizes": digest}
