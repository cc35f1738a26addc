"""Where text comes from: the embedded tales, WikiText, TinyStories, your own files or a hub dataset.

A *document* is what BOS and EOS will enclose: a tale, an article, a story, a row, a text file or a passage of a long
one. Documents stream (`readers.py`), so a corpus may be larger than memory.

Where a source has no published split, one is made by a hash of each document's text: two copies of a text are always
in the same split. Of one's own files, documents that are nearly the same are kept together too (`duplicates.py`), and
adding files moves no document but those that a new one is nearly the same as.

A new dataset is one function and one entry in `OPENERS`, and its name in `CORPORA` of `config.py`.

    from tale_jax.data.corpus import open_corpus
    corpus = open_corpus(config.corpus, config.seed)
    for text in corpus.documents("train"): ...
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from tale_jax.config import CorpusConfig
from tale_jax.data import readers
from tale_jax.data.chat import CHAT_FIELD, contents
from tale_jax.data.duplicates import NearDuplicates, text_hash
from tale_jax.data.readers import Cut, Document
from tale_jax.data.text_files import expand, find_files, fingerprint, kind_of, lines, printable, read_text

SPLITS = ("train", "valid", "test")
MIN_DOCUMENTS = 16  # of files; where there are fewer, documents are cut shorter
MIN_CORPUS_BYTES = 5_000
MIN_SHORT_CUT, SHORT_DOCUMENTS = 256, 24  # bytes of the shortest cut, and about how many documents it aims at
MAX_HELD_OUT_CLUSTER = 0.25  # of all bytes; documents that belong together and are more are for training
SPLIT_RULE = 2  # which documents are in which split; another number for another rule


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
class SplitPlan:
    """Which document of the files is in which split.

    Attributes:
      cut: how texts become documents.
      split_of: for each document the index of its split in `SPLITS`, or `NOT_READ`.
      num_bytes, num_texts: of each split; a text is a file, or a row of one.
    """

    cut: Cut
    split_of: UInt8[np.ndarray, " N"]
    num_bytes: dict[str, int]
    num_texts: dict[str, int]


NOT_READ = 255  # behind the end of max_train_bytes


class FileSplits:
    """The documents of files, shared out to splits once all of them have been compared."""

    def __init__(self, files: list[Path], config: CorpusConfig, identity: dict[str, Any]):
        self._files, self._config = files, config
        self._key = json.dumps(identity, sort_keys=True)
        self.source_bytes = sum(file.stat().st_size for file in files)
        packed = [file for file in files if kind_of(file) != file.suffix.lower() or kind_of(file) == ".parquet"]
        self.source_bytes = 0 if packed else self.source_bytes  # how much text they hold only reading can tell

    def read(self, cut: Cut) -> Iterator[Document]:
        return readers.read_documents(self._files, self._config.field, self._config.encoding, cut)

    def documents(self, split: str) -> Iterator[str]:
        """The documents of a split, in order."""
        plan, number = self.plan(), SPLITS.index(split)
        last, count = len(plan.split_of), 0
        for document in self.read(plan.cut):
            if count == last:
                break
            if plan.split_of[count] == number:
                yield document.text
            count += 1
        if count < last:
            raise ValueError(
                f"corpus.path={printable(self._config.path)} changed while it was read; run this once more"
            )

    def plan(self, advance: Callable[[int], None] = lambda count: None) -> SplitPlan:
        """Reads all documents, unless that was done before, and shares them out; `advance` is told bytes of text.

        Raises:
          ValueError: one line, where there is too little text for three splits.
        """
        if self._key not in _plans:
            plan = self._make_plan(advance)
            _plans.clear()
            _plans[self._key] = plan
        return _plans[self._key]

    def _make_plan(self, advance: Callable[[int], None]) -> SplitPlan:
        cut = Cut()
        plan, count, total = self._compare(cut, advance)
        if count >= MIN_DOCUMENTS and plan:
            return plan
        name = f"corpus.path={printable(self._config.path)}"
        limit = self._config.max_train_bytes
        more = (
            f"set --config.corpus.max_train_bytes={MIN_CORPUS_BYTES} or more (it is {limit})"
            if 0 < limit < MIN_CORPUS_BYTES
            else "add text"
        )
        if not total:
            raise ValueError(f"{name} holds no text but white space; {more}")
        if count < MIN_DOCUMENTS:
            if total < MIN_CORPUS_BYTES:
                raise ValueError(
                    f"{name} must hold at least {MIN_CORPUS_BYTES:,} bytes of text (or {MIN_DOCUMENTS} documents) for "
                    f"its three splits, but holds {total:,}; {more}"
                )
            size = max(1 << (total // SHORT_DOCUMENTS).bit_length() - 1, MIN_SHORT_CUT)
            plan, count, _ = self._compare(Cut(2 * size, size), lambda count: None)
        if not plan:
            raise ValueError(
                f"{name} must hold three documents that differ, one for each split, but its {count:,} documents are "
                "the same text over and over; add text that does not repeat itself"
            )
        return plan

    def _compare(self, cut: Cut, advance: Callable[[int], None]) -> tuple[SplitPlan | None, int, int]:
        """A plan, None where a split would be empty; how many documents there are, and bytes in them."""
        config, text_indices, train_bytes = self._config, [], 0
        with NearDuplicates() as near:
            for document in self.read(cut):
                size = near.add(document.text)
                text_indices.append(document.text_index)
                advance(size)
                if config.max_train_bytes and near.last_position >= 2 * config.held_out:
                    train_bytes += size
                    if train_bytes > config.max_train_bytes:
                        break
            sizes, clusters = near.sizes(), near.clusters(config.held_out)
            positions = near.positions(clusters)
        count, total = len(sizes), int(sizes.sum())
        split_of = _share_out(clusters, positions, sizes, config.held_out)
        if split_of is None:
            return None, count, total
        if config.max_train_bytes:
            train = split_of == 0
            split_of[train & (np.cumsum(np.where(train, sizes, 0)) > config.max_train_bytes)] = NOT_READ
        indices = np.array(text_indices, np.int64)
        members = {split: split_of == number for number, split in enumerate(SPLITS)}
        num_bytes = {split: int(sizes[chosen].sum()) for split, chosen in members.items()}
        num_texts = {split: len(np.unique(indices[chosen])) for split, chosen in members.items()}
        return SplitPlan(cut, split_of, num_bytes, num_texts), count, total


_plans: dict[str, SplitPlan] = {}  # the last one: a run opens its corpus more than once


def _share_out(
    clusters: Int64[np.ndarray, " N"],
    positions: Float64[np.ndarray, " N"],
    sizes: Int64[np.ndarray, " N"],
    held_out: float,
) -> UInt8[np.ndarray, " N"] | None:
    """The split of each document, as an index into `SPLITS`; None where there are too few clusters to fill all.

    A cluster is in the split that its position falls into. In a small corpus that may leave a split empty: it then gets
    the cluster that is next to it.
    """
    if not len(clusters):
        return None
    position = np.zeros(clusters.max() + 1)
    position[clusters] = positions
    share = np.bincount(clusters, sizes) / sizes.sum()
    split = np.where(position < held_out, 1, np.where(position < 2 * held_out, 2, 0))
    split[share > MAX_HELD_OUT_CLUSTER] = 0
    if len(split) < len(SPLITS):
        return None
    for number in (1, 2, 0):
        if (split == number).any():
            continue
        donor = np.bincount(split, minlength=len(SPLITS)).argmax()
        candidates = np.flatnonzero(split == donor)
        if number:  # not one that most of the text would go to
            candidates = candidates[share[candidates] <= max(2 * held_out, share[candidates].min())]
        order = np.argsort(position[candidates], kind="stable")
        split[candidates[order[0 if number else -1]]] = number
    return split[clusters].astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of three splits.

    Attributes:
      identity: what the documents depend on, as JSON: the settings that matter, and what the files are.
      splits: where each split is read, unless `files` are.
      max_train_bytes: reading ends where the training split has so many bytes of text; 0: never.
      words_end_lines: WikiText's convention, in which the end of each line counts as a word (`count_words`).
      nats: -log probability of each document of a split, in order, where the corpus knows it (tales); else None.
      files: documents of one's own files.
      chat: the documents are conversations (see `chat.py`).
      notes: what was left out, a line for people each.
    """

    identity: dict[str, Any]
    splits: dict[str, SplitSource] = dataclasses.field(default_factory=dict)
    max_train_bytes: int = 0
    words_end_lines: bool = False
    nats: Callable[[str], Iterator[float]] | None = None
    files: FileSplits | None = None
    chat: bool = False
    notes: tuple[str, ...] = ()

    def texts(self, split: str) -> Iterator[str]:
        """The documents of a split; of conversations what their messages say. A tokenizer learns from these."""
        for document in self.documents(split):
            yield from contents(document) if self.chat else (document,)

    def documents(self, split: str) -> Iterator[str]:
        """Streams the documents of "train", "valid" or "test", the same ones in the same order every time.

        Raises:
          ValueError: one line, for an empty split and for text that cannot be read (file, place and reason).
        """
        if self.files:
            yield from self.files.documents(split)
            return
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
            settings = {k: self.identity[k] for k in ("name", "path", "hub_name") if self.identity.get(k)}
            fields = " ".join(f"corpus.{name}={printable(value)}" for name, value in settings.items())
            or_change = ""
            if wanted.source is train.source:  # the splits are cut from one source, by this share
                change = "lower" if split == "train" else "raise"
                or_change = f", or {change} corpus.held_out={self.identity['held_out']}"
            raise ValueError(f"{fields} must hold a document for the {split} split; give more text{or_change}")

    def num_bytes(self, split: str) -> int | None:
        """About how many bytes of text a split has, for a progress bar; None when only reading can tell."""
        if self.files:
            return self.files.plan().num_bytes[split]
        wanted = self.splits[split]
        if wanted.source.num_bytes is None:
            return None
        size = int(wanted.source.num_bytes * (wanted.high - wanted.low))
        return min(size, self.max_train_bytes or size) if split == "train" else size

    def num_texts(self, split: str) -> int:
        """How many files or rows the documents of a split come from; 0: as many as there are documents."""
        return self.files.plan().num_texts[split] if self.files else 0


def open_corpus(config: CorpusConfig, seed: int, workdir: Path | None = None) -> Corpus:
    """The corpus that the settings name; its files are looked for, but not decoded yet.

    Args:
      config: the `corpus` settings.
      seed: of the tales; no other corpus depends on it.
      workdir: of the run, which is no text for it.

    Raises:
      ValueError: one line, for a missing path, library or file.
    """
    return OPENERS[config.name].open(config, seed, workdir)


def relevant_settings(config: CorpusConfig) -> dict[str, Any]:
    """The settings that the documents of this corpus depend on."""
    return {field: getattr(config, field) for field in ("name", *OPENERS[config.name].settings)}


def _open_tales(config: CorpusConfig, seed: int, workdir: Path | None) -> Corpus:
    del workdir
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


def _open_tales_chat(config: CorpusConfig, seed: int, workdir: Path | None) -> Corpus:
    """Questions about tales, and their answers."""
    del workdir
    from tale_jax.data.tales.questions import conversation_about

    def source(split: str) -> Source:
        count = getattr(config, f"num_{split}_tales")
        size = sum(len(conversation_about(index, split, seed).encode()) for index in range(8)) // 8
        return Source(lambda: (conversation_about(index, split, seed) for index in range(count)), count * size)

    first = "\n".join(conversation_about(index, "train", seed) for index in range(32))
    digest = hashlib.blake2b(first.encode(), digest_size=16).hexdigest()
    splits = {split: SplitSource(source(split)) for split in SPLITS}
    return Corpus(relevant_settings(config) | {"grammar": digest}, splits, chat=True)


def _open_wikitext(config: CorpusConfig, seed: int, workdir: Path | None) -> Corpus:
    del seed, workdir

    def from_hub(split: str) -> Source:
        variant = "wikitext-2-v1" if config.name == "wikitext2" else "wikitext-103-v1"
        rows = readers.HubRows("Salesforce/wikitext", variant, "validation" if split == "valid" else split, "text")
        # A row is a line of the original file; only the blank lines, " \n", are empty on the hub.
        return Source(lambda: readers.articles(row or " \n" for row in rows))

    def from_file(path: Path) -> Source:
        return Source(lambda: readers.articles(lines(read_text(path, ""))), path.stat().st_size)

    files = {split: _find_split(config, split, ("{}.txt", "wiki.{}.tokens")) for split in SPLITS} if config.path else {}
    sources = {split: from_file(files[split]) if files else from_hub(split) for split in SPLITS}
    return Corpus(
        identity=relevant_settings(config) | fingerprint(list(files.values())),
        splits={split: SplitSource(sources[split]) for split in SPLITS},
        max_train_bytes=config.max_train_bytes,
        words_end_lines=True,
    )


def _open_tinystories(config: CorpusConfig, seed: int, workdir: Path | None) -> Corpus:
    """TinyStories publishes no test split: half of the published validation stories, chosen by hash, are test."""
    del seed, workdir
    names = ("TinyStoriesV2-GPT4-{}.txt", "TinyStories-{}.txt", "{}.txt")
    path = expand(config.path)
    if not config.path:
        files = []
        train, valid = (_from_hub("roneneldan/TinyStories", "", name, "text") for name in ("train", "validation"))
    else:
        files = [path] if path.is_file() else [_find_split(config, split, names) for split in ("train", "valid")]
        train, valid = (
            Source(lambda f=f: readers.stories(read_text(f, "")), f.stat().st_size) for f in (files[0], files[-1])
        )
    splits = {"train": SplitSource(train), "valid": SplitSource(valid, 0.0, 0.5), "test": SplitSource(valid, 0.5, 1.0)}
    if len(files) == 1:  # a file of stories without published splits
        splits = _hold_out(train, {}, config.held_out)
    return Corpus(relevant_settings(config) | fingerprint(files), splits, config.max_train_bytes)


def _open_files(config: CorpusConfig, seed: int, workdir: Path | None) -> Corpus:
    del seed
    files, notes = find_files(config.path, workdir)
    identity = relevant_settings(config) | {"split_rule": SPLIT_RULE} | fingerprint(files)
    chat = config.field == CHAT_FIELD or readers.holds_conversations(files[0], config.field, config.encoding)
    if chat:
        config, identity = dataclasses.replace(config, field=CHAT_FIELD), identity | {"chat": True}
    return Corpus(identity, files=FileSplits(files, config, identity), chat=chat, notes=tuple(notes))


def _open_hub(config: CorpusConfig, seed: int, workdir: Path | None) -> Corpus:
    del seed, workdir
    names = {"train": config.train_split, "valid": config.valid_split, "test": config.test_split}
    source = functools.partial(_from_hub, config.hub_name, config.hub_config, field=config.field)
    sources = {split: source(name) for split, name in names.items() if name}
    train = sources.pop("train")
    return Corpus(relevant_settings(config), _hold_out(train, sources, config.held_out), config.max_train_bytes)


class Opener(NamedTuple):
    """How a corpus is opened, and the settings that its documents depend on; another value of the others is no harm."""

    open: Callable[[CorpusConfig, int, Path | None], Corpus]
    settings: tuple[str, ...]


OPENERS = {
    "tales": Opener(_open_tales, ("num_train_tales", "num_valid_tales", "num_test_tales")),
    "tales_chat": Opener(_open_tales_chat, ("num_train_tales", "num_valid_tales", "num_test_tales")),
    "wikitext2": Opener(_open_wikitext, ("path", "max_train_bytes")),
    "wikitext103": Opener(_open_wikitext, ("path", "max_train_bytes")),
    "tinystories": Opener(_open_tinystories, ("path", "held_out", "max_train_bytes")),
    "files": Opener(_open_files, ("path", "field", "encoding", "held_out", "max_train_bytes")),
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
    return text_hash(text.encode()) / 2**48


def _find_split(config: CorpusConfig, split: str, names: tuple[str, ...]) -> Path:
    folder = expand(config.path)
    if not folder.exists():
        raise ValueError(
            f"corpus.path={printable(config.path)} does not exist; give the folder that holds {config.name}"
        )
    for name in names:
        if (file := folder / name.format(split)).is_file():
            if not file.stat().st_size:
                raise ValueError(
                    f"corpus.path={printable(config.path)}: {file.name} must not be empty; download it again"
                )
            return file
    tried = " or ".join(name.format(split) for name in names)
    raise ValueError(
        f"corpus.path={printable(config.path)} must be a folder that holds {tried}; there is no such file in it"
    )
