"""Documents → a tokenizer and token files (`token_files.py`) in a workdir, once.

Every file is written under a temporary name and renamed when it is whole, the manifest last. A killed run leaves whole
splits and a temporary file; the next run removes that file and prepares what is missing. Token files that were made
with other settings are refused, never overwritten; those of text that has changed since are written anew, with the same
tokenizer, where corpus.changed=continue.

    python launch/prepare.py --config=configs/tales.py --workdir=experiments/tales
"""

import collections
import dataclasses
import errno
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from tale_jax.config import Config, CorpusConfig, change
from tale_jax.data.chat import ChatCounts
from tale_jax.data.chat_template import TEMPLATE_FILE, keep_template, read_template
from tale_jax.data.corpus import SPLITS, Corpus, open_corpus, relevant_settings
from tale_jax.data.duplicates import RUN_BYTES, RunSample
from tale_jax.data.encode import Chats, encode, stream_dtype
from tale_jax.data.marks import DTYPE
from tale_jax.data.tales.grammar import ratio
from tale_jax.data.text_files import expand, printable
from tale_jax.data.token_files import (
    Manifest,
    document_starts,
    iter_documents,
    load_manifest,
    load_tokens,
    save_manifest,
    tokens_digest,
)
from tale_jax.data.tokenizer import (
    JSON_FILE,
    Tokenizer,
    check_tokenizer,
    fillable_vocab_size,
    tokenizer_file,
    train_tokenizer,
)
from tale_jax.utils.files import LINKED, atomic_writer, check_inside, json_object
from tale_jax.utils.locks import writer_lock
from tale_jax.utils.progress import Progress

MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = 512, 8192  # of a vocabulary that is chosen here
CHARACTER_SAMPLE_BYTES = 1 << 21  # text whose characters are counted
# Standard deviations of losses, in nats: between tokens of a document, and between means of documents (passages of
# about 3 kB). A trigram model of 2,048 tokens on children's books has 2.84 and 0.21.
TOKEN_DEVIATION, DOCUMENT_DEVIATION = 2.8, 0.2
MAX_TOKENIZER_BYTES = 1 << 26  # of a file; a vocabulary of 262,144 takes 5 MB
MIN_TOLD_INTERVAL = 0.03  # nats per token; a smaller half width is not worth a word
CHANGED_NOTE = "the text has changed: prepared again, with the same tokenizer; the data position starts anew"
BASE_FOLDER = LINKED  # where the base of a fine-tuned workdir is looked for first: a folder in it, or a link there
BASE_FILE = "base.json"  # of a fine-tuned workdir: which base it was, by path, step and digest
MAX_BASE_FILE_BYTES = 1 << 16
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

    @property
    def chat(self) -> bool:
        """Whether the documents are conversations."""
        return bool(self.manifests["train"].chat)


def prepare(config: Config, workdir: Path, log: Path | None = None) -> Prepared:
    """The tokenizer and the token files of all three splits, made where `workdir` lacks them.

    Args:
      config: uses `corpus`, `tokenizer`, `seed` and `model.seq_len`.
      workdir: created when missing. One that is prepared is only read, unless its text has changed and
        `corpus.changed` is "continue".
      log: file that the lines of progress are appended to.

    Raises:
      ValueError: one line, for token files of other settings in `workdir`, or a corpus or tokenizer that cannot be
        used.
      OSError: one line, when `workdir` cannot be written or its disk is full. Splits that were whole still are.
    """
    if config.corpus.changed != "continue" and len(_present(workdir)) == len(SPLITS):
        return _prepare(config, workdir, log)  # nothing is written, so that a run beside it does no harm
    with ExitStack() as held:
        with _disk_errors_explained(workdir):
            held.enter_context(writer_lock(workdir, "prepare", of_worth))
        return _prepare(config, workdir, log)


def link_prepared(source: Path, workdir: Path) -> None:
    """Gives a workdir the tokenizer and the token files of another; what it has of them stays.

    They are the same files under two names, or copies where the file system has no such links: nobody writes to them.
    """
    for folder in ("tokenizer", "windows"):
        if not (workdir / folder).is_dir():
            shutil.copytree(source / folder, workdir / folder, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _present(workdir: Path) -> list[str]:
    """The splits that are whole."""
    return [split for split in SPLITS if (workdir / "windows" / f"{split}.json").is_file()]


def of_worth(workdir: Path) -> list[Path]:
    """What a command that fails leaves in a workdir for the next one: splits that are whole, a run that began, and
    what it found damaged."""
    files = [workdir / "windows" / f"{split}.json" for split in _present(workdir)]
    return [*files, *workdir.glob("config.json"), *workdir.glob(BASE_FOLDER), *workdir.glob("damaged/*")]


def _prepare(config: Config, workdir: Path, log: Path | None) -> Prepared:
    present = _present(workdir)
    if len(present) < len(SPLITS):
        with _disk_errors_explained(workdir):
            for name in ("tokenizer", "windows"):
                (workdir / name).mkdir(parents=True, exist_ok=True)
                for partial in (workdir / name).glob("*.partial"):  # of a run that was killed
                    partial.unlink()
    if config.base and not tokenizer_file(workdir).is_file():
        _copy_tokenizer(base_folder(workdir, config.base), workdir)
    manifests = {split: load_manifest(workdir, split) for split in present}
    corpus = _open_corpus(config, manifests, workdir)
    old = {split: m for split, m in manifests.items() if corpus and _changed_files(m, corpus, config, len(manifests))}
    if config.corpus.changed != "continue":
        old = {}
    missing = [split for split in SPLITS if corpus and (split not in manifests or split in old)]
    if corpus and missing:
        _tell([*corpus.notes, *([CHANGED_NOTE] if old else [])], log)
        _compare_documents(corpus, log)
    brought = bool(config.base) or tokenizer_file(workdir).name == JSON_FILE  # with the model: it stays
    if corpus and not manifests and not brought:
        tokenizer = _write_tokenizer(corpus, config, workdir, log)
    else:
        tokenizer = load_tokenizer(workdir)
    if brought and tokenizer.vocab_size > config.tokenizer.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={config.tokenizer.vocab_size} must be that of {tokenizer_file(workdir)}; "
            f"try --config.tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    for split, manifest in manifests.items():
        _check_settings(manifest, config, None if split in old else corpus, tokenizer, workdir, len(manifests))
    train_runs: RunSample | None = None
    for split in missing:
        assert corpus
        replaced = [*old[split].replaced, _summary(old[split])] if split in old else []
        runs = None if corpus.nats or corpus.chat else RunSample()  # of tales more is known
        if runs and split != "train" and train_runs is None:  # that split is whole since an earlier run
            train_runs = RunSample()
            for text in corpus.documents("train"):
                train_runs.add(text)
        manifests[split] = _write_split(
            corpus, split, tokenizer, config, workdir, log, runs, train_runs if split != "train" else None, replaced
        )
        train_runs = runs if split == "train" else train_runs
    return Prepared(workdir, tokenizer, {split: manifests[split] for split in SPLITS})


def base_folder(workdir: Path, base: str) -> Path:
    """Where the base of a fine-tuned workdir lies: in it, at the path that the setting `base` names, or where it was,
    since that path may be of another current folder."""
    inside = Path(workdir) / BASE_FOLDER
    if inside.exists():
        return inside
    named = expand(base, "base")
    return named if named.exists() else Path(read_base_file(workdir).get("path", named))


def read_base_file(workdir: Path) -> dict[str, Any]:
    """What `open_base` has written of the base of a workdir: path, step, weights and digest; empty where it has not.

    Raises ValueError, in one line, for a file that it has not written.
    """
    file = Path(workdir) / BASE_FILE
    if not file.exists():
        return {}
    check_inside(Path(workdir), file, MAX_BASE_FILE_BYTES)
    remedy = "restore it from a copy, or remove it: the checkpoints know the digest of their base"
    known = json_object(file.read_bytes(), file, remedy)
    kinds = {"path": str, "step": int, "weights": str, "digest": str}
    if any(type(known.get(name)) is not kind for name, kind in kinds.items()):
        raise ValueError(f"{file} must name the path, step, weights and digest of a base; {remedy}")
    return known


def _copy_tokenizer(base: Path, workdir: Path) -> None:
    """The tokenizer of the base, and its chat template, for the text of this run."""
    if not tokenizer_file(base).is_file():
        raise ValueError(f"base={base} must hold a tokenizer (none in {base}/tokenizer); restore it")
    partial = workdir / "tokenizer.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(base / "tokenizer", partial)
    shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
    partial.rename(workdir / "tokenizer")


def load_tokenizer(workdir: Path) -> Tokenizer:
    """The tokenizer of a workdir. Raises ValueError, in one line, when it is missing, or cannot be one."""
    if (file := tokenizer_file(workdir)).is_file():
        check_inside(workdir, file, MAX_TOKENIZER_BYTES)
    return Tokenizer.load(file)


def describe(manifest: Manifest) -> str:
    """What a prepared split is, in one line."""
    m = manifest
    line = f"{m.split:>5}: {m.documents:,} document{'s' * (m.documents != 1)}"
    if 0 < m.texts < m.documents:
        line += f" (passages of {m.texts:,} text{'s' * (m.texts != 1)})"
    line += f", {m.words:,} words, {m.bytes:,} bytes, {m.tokens:,} tokens"
    if m.chat:
        rows, truncated = m.chat["rows"], m.chat["truncated"]
        unlearned = 1 - m.chat["learned_tokens"] / max(1, m.tokens)
        line = (
            f"{m.split:>5}: {rows:,} row{'s' * (rows != 1)} of conversations, {m.tokens:,} tokens: "
            f"{m.chat['learned_tokens']:,} of the assistant, the rest ({unlearned:.1%}) masked; {truncated:,} "
            f"conversation{'s' * (truncated != 1)} truncated, to the {m.window_len} tokens of a window"
        )
    if m.entropy:
        line += f"; entropy {m.entropy['nats_per_token']:.4f} nats/token"
    if m.seen_share is not None:
        line += f"; {m.seen_share:.1%} of its runs of {RUN_BYTES} bytes occur in the training split"
    if m.split != "train" and not m.entropy and (half := loss_interval(m)) >= MIN_TOLD_INTERVAL:
        line += f"; a loss on it is known to about ±{half:.1g} nats/token"
        line += ", and says little about any other text" if m.texts == 1 else ""
    return line


def loss_interval(manifest: Manifest) -> float:
    """Half of the width of the 95 % interval of a loss on a split, in nats per token, from how much text that is."""
    variance = TOKEN_DEVIATION**2 / max(1, manifest.tokens) + DOCUMENT_DEVIATION**2 / max(1, manifest.documents)
    return 1.96 * math.sqrt(variance)


def _tell(lines: list[str], log: Path | None) -> None:
    if lines:
        with Progress("prepare", log=log) as progress:
            for line in lines:
                progress.print(line)


def _compare_documents(corpus: Corpus, log: Path | None) -> None:
    """Finds the documents that belong together, where the splits depend on it."""
    if corpus.files:
        with Progress("compare documents", total=corpus.files.source_bytes, unit="bytes", log=log) as progress:
            corpus.files.plan(_advance_below(progress, corpus.files.source_bytes))


def _advance_below(progress: Progress, total: int) -> Callable[[int], None]:
    """`progress.advance`, but never beyond `total` (0: unknown), which is an estimate."""
    left = total

    def advance(count: int) -> None:
        nonlocal left
        step = min(count, left) if total else count
        left -= step
        progress.advance(step)

    return advance


def _summary(manifest: Manifest) -> dict[str, Any]:
    """What is kept of a split that another text takes the place of."""
    files = {name: manifest.corpus.get(name) for name in ("files", "bytes", "contents")}
    return files | {"documents": manifest.documents, "tokens": manifest.tokens, "sha256": manifest.sha256}


def with_vocab_size(config: Config, workdir: Path | None = None) -> tuple[Config, str]:
    """The config with a vocabulary that suits its training text, and the reason in words; one of `tokenizer.path` is
    kept."""
    if config.tokenizer.path:
        return config, f"vocabulary {config.tokenizer.vocab_size:,}: that of {config.tokenizer.path}"
    size, characters, texts = 0, collections.Counter[str](), []
    for text in open_corpus(config.corpus, config.seed, workdir).texts("train"):
        if size < CHARACTER_SAMPLE_BYTES:
            characters.update(text)
            texts.append(text)
        size += len(text.encode())
        if size >= MAX_VOCAB_SIZE**2:  # more text would change nothing
            break
    vocab_size = suitable_vocab_size(size, characters)
    if size < CHARACTER_SAMPLE_BYTES // 2:  # of digits, say, even more text cannot fill a usual vocabulary
        vocab_size = fillable_vocab_size(texts, vocab_size)
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


def _open_corpus(config: Config, manifests: dict[str, Manifest], workdir: Path) -> Corpus | None:
    """The corpus; None when it is gone (as where a workdir was copied to) and all splits are prepared."""
    try:
        return open_corpus(config.corpus, config.seed, workdir)
    except ValueError:
        wanted = relevant_settings(config.corpus)
        same = all(_recorded(m.corpus, name) == value for m in manifests.values() for name, value in wanted.items())
        if len(manifests) == len(SPLITS) and same:
            return None
        raise


def _recorded(corpus: dict[str, Any], name: str) -> Any:
    """A setting of the corpus in a manifest; one that is newer than the manifest had its default."""
    return corpus.get(name, getattr(CorpusConfig(), name))


def _changed_files(manifest: Manifest, corpus: Corpus, config: Config, num_splits: int) -> str:
    """What differs between the files of a prepared split and those that are there now; "" when nothing does.

    The folder may have another name. A manifest of version 0.2 has no digest of the contents, and its documents were
    cut and shared out by another rule, which matters only where splits of the two rules would stand together.
    """
    old = manifest.corpus
    for name, value in corpus.identity.items():
        older = name not in old and (name == "contents" or (name == "split_rule" and num_splits == len(SPLITS)))
        if name not in relevant_settings(config.corpus) and not older and value != old.get(name):
            return f"{name} was {old.get(name)} and is {value}"
    return ""


def _check_settings(
    manifest: Manifest, config: Config, corpus: Corpus | None, tokenizer: Tokenizer, workdir: Path, num_splits: int
) -> None:
    """Raises ValueError, in one line, with the first setting or file that is not as it was when the split was made."""
    if config.model.seq_len > manifest.window_len:
        raise ValueError(
            f"model.seq_len={config.model.seq_len} must not exceed the windows of {manifest.window_len} tokens that "
            f"{workdir} was prepared with; try --config.model.seq_len={manifest.window_len}, or a new --workdir"
        )
    settings = relevant_settings(config.corpus)
    pairs = {f"corpus.{name}": (value, _recorded(manifest.corpus, name)) for name, value in settings.items()}
    pairs.pop("corpus.path", None)
    pairs |= {"seed": (config.seed, manifest.seed)}
    for name, value in dataclasses.asdict(config.tokenizer).items():
        pairs[f"tokenizer.{name}"] = (value, manifest.tokenizer_settings.get(name, value))
    remedy = "choose a new --workdir"
    if not (workdir / "checkpoints").is_dir():  # what they have learned belongs to these windows
        remedy += f", or remove {workdir}/windows to prepare again"
    for field, (value, old_value) in pairs.items():
        if value != old_value:
            raise ValueError(f"{field}={value} must be {old_value}, as in the windows prepared in {workdir}; {remedy}")
    if corpus and (difference := _changed_files(manifest, corpus, config, num_splits)):
        path = config.corpus.path
        field = f"corpus.path={printable(path)}" if path else f"corpus.name={config.corpus.name}"
        go_on = "set --config.corpus.changed=continue to prepare it again and go on, or "
        raise ValueError(
            f"{field} must be as it was when {workdir} was prepared, but {difference}; {go_on if path else ''}{remedy}"
        )
    template = manifest.chat.get("template")
    if template and template != _template_digest(read_template(workdir, tokenizer)):
        raise ValueError(
            f"{workdir}/tokenizer/{TEMPLATE_FILE} must be the one that {workdir}/windows was prepared with; restore "
            f"it, or {remedy}"
        )
    if tokenizer.fingerprint != manifest.tokenizer:
        raise ValueError(f"{workdir}/tokenizer must be the one that {workdir}/windows was prepared with; {remedy}")


def _write_tokenizer(corpus: Corpus, config: Config, workdir: Path, log: Path | None) -> Tokenizer:
    if config.tokenizer.path:
        tokenizer = Tokenizer.load(expand(config.tokenizer.path, "tokenizer.path"))
        check_tokenizer(tokenizer, config.tokenizer)
    else:
        total = corpus.num_bytes("train") or 0
        with Progress("read for the tokenizer", total=total, unit="bytes", log=log) as progress:
            advance = _advance_below(progress, total)

            def documents() -> Iterator[str]:
                for text in corpus.texts("train"):
                    yield text
                    advance(len(text.encode()))

            tokenizer = train_tokenizer(documents(), config.tokenizer)
    with _disk_errors_explained(workdir):
        tokenizer.save(workdir / "tokenizer")
    return tokenizer


def _write_split(
    corpus: Corpus,
    split: str,
    tokenizer: Tokenizer,
    config: Config,
    workdir: Path,
    log: Path | None,
    runs: RunSample | None,
    train_runs: RunSample | None,
    replaced: list[dict[str, Any]],
) -> Manifest:
    path = workdir / "windows" / f"{split}.bin"
    documents = words = num_bytes = size = 0
    total = corpus.num_bytes(split)
    chats = Chats(keep_template(workdir, tokenizer), config.model.seq_len) if corpus.chat else None
    dtype, counts = stream_dtype(tokenizer, chats), ChatCounts()

    def texts() -> Iterator[str]:
        for text in corpus.documents(split):
            if runs:
                runs.add(text)
            yield text

    with _disk_errors_explained(workdir):
        with (
            Progress(f"prepare {split}", total=total or 0, unit="bytes", log=log) as progress,
            atomic_writer(path) as file,
        ):
            advance = _advance_below(progress, total or 0)
            for batch in encode(texts(), tokenizer, total, corpus.words_end_lines, chats=chats):
                size += file.write(batch.tokens)
                documents += batch.documents
                words += batch.words
                num_bytes += batch.num_bytes
                counts = ChatCounts(*map(sum, zip(counts, batch.chat, strict=True)))
                advance(batch.read_bytes or batch.num_bytes)
        manifest = Manifest(
            split=split,
            corpus=corpus.identity,
            seed=config.seed,
            tokenizer=tokenizer.fingerprint,
            tokenizer_settings=dataclasses.asdict(config.tokenizer),
            window_len=config.model.seq_len,
            dtype=dtype.str,
            documents=documents,
            words=words,
            bytes=num_bytes,
            tokens=size // dtype.itemsize,
            entropy=_entropy(corpus, split, np.memmap(path, dtype, mode="r"), tokenizer),
            texts=corpus.num_texts(split),
            seen_share=runs.share_in(train_runs) if runs and train_runs else None,
            replaced=replaced,
            chat=_chat_facts(counts, chats),
            has_marks=dtype == DTYPE,
            sha256=tokens_digest(path),
        )
        save_manifest(workdir, manifest)
    return manifest


def _chat_facts(counts: ChatCounts, chats: Chats | None) -> dict[str, Any]:
    """`Manifest.chat`."""
    if not chats:
        return {}
    facts = {"rows": counts.rows, "learned_tokens": counts.learned, "truncated": counts.truncated}
    return facts | {"template": _template_digest(chats.template)}


def _template_digest(template: str) -> str:
    return hashlib.sha256(template.encode()).hexdigest()


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
