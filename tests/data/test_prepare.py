"""Token files hold the text exactly, are reused, refused or finished, and are never left half-written."""

import collections
import dataclasses
import errno
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from helpers import ROOT, build_config

from tale_jax.data import prepare as prepare_module
from tale_jax.data.corpus import SPLITS, open_corpus
from tale_jax.data.prepare import prepare, suitable_vocab_size, with_vocab_size
from tale_jax.data.tales import grammar as tales
from tale_jax.data.token_files import document_starts, iter_documents, load_tokens
from tale_jax.data.tokenizer import Tokenizer

BOOK = "".join(f"Chapter {n}.\n\nThe fox number {n} went over hill {n * 7 % 13} and far away.\n\n" for n in range(900))


@pytest.fixture(scope="module")
def tiny_tales(tmp_path_factory):
    """The tiny tales and where they are prepared. Not to be written to."""
    workdir = tmp_path_factory.mktemp("prepared")
    return build_config(), workdir, prepare(build_config(), workdir)


@pytest.fixture
def book(tmp_path):
    """A config of files whose text is a short book."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book.txt").write_text(BOOK)
    return book_config(tmp_path)


def book_config(tmp_path, **changes):
    changes = {
        f"corpus.{key}": value for key, value in (("name", "files"), ("path", str(tmp_path / "texts")))
    } | changes
    return build_config(**({"tokenizer.vocab_size": 320, "model.seq_len": 64} | changes))


def contents(workdir):
    return {str(p.relative_to(workdir)): p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def test_token_files_hold_the_documents_between_bos_and_eos(tiny_tales):
    config, workdir, prepared = tiny_tales
    corpus = open_corpus(config.corpus, config.seed)
    for split in SPLITS:
        tokens, manifest = load_tokens(workdir, split)
        texts = list(corpus.documents(split))
        assert list(iter_documents(tokens, prepared.tokenizer)) == texts
        assert (prepared.tokens(split) == tokens).all()
        assert not tokens.flags.writeable
        starts = document_starts(tokens, prepared.tokenizer.bos_id, block=1000)
        assert starts[0] == 0
        assert (tokens[starts[1:] - 1] == prepared.tokenizer.eos_id).all()
        assert tokens[-1] == prepared.tokenizer.eos_id
        assert manifest == prepared.manifests[split]
        assert manifest.documents == len(texts) == len(starts)
        assert manifest.words == sum(len(text.split()) for text in texts)
        assert manifest.bytes == sum(len(text.encode()) for text in texts)
        assert manifest.tokens == len(tokens) == sum(len(prepared.tokenizer.encode(t)) + 2 for t in texts)
        assert (manifest.split, manifest.dtype, manifest.window_len) == (split, "<u2", config.model.seq_len)
        assert manifest.tokenizer == prepared.tokenizer.fingerprint


def test_entropy_of_the_held_out_tales(tiny_tales):
    config, _, prepared = tiny_tales
    assert prepared.manifests["train"].entropy == {}
    entropy = prepared.manifests["valid"].entropy
    told = [tales.tell(index, "valid", config.seed) for index in range(config.corpus.num_valid_tales)]
    nats = np.array([-tale.logprob for tale in told])
    assert entropy["nats"] == pytest.approx(nats.sum())
    assert entropy["nats_per_tale"] == pytest.approx(nats.mean())
    assert entropy["nats_per_tale_stderr"] == pytest.approx(nats.std(ddof=1) / len(nats) ** 0.5)
    assert entropy["nats_per_byte"] == pytest.approx(nats.sum() / sum(len(tale.text.encode()) for tale in told))
    tokens = sum(len(prepared.tokenizer.encode(tale.text)) + 1 for tale in told)
    assert entropy["nats_per_token"] == pytest.approx(nats.sum() / tokens)
    assert 0 < entropy["nats_per_token_stderr"] < entropy["nats_per_token"] / 5


def test_reused_and_the_same_wherever_prepared(tiny_tales, tmp_path, monkeypatch):
    config, workdir, prepared = tiny_tales
    prepare(config, tmp_path)
    assert contents(tmp_path) == contents(workdir)
    monkeypatch.setattr(prepare_module, "_write_split", None)  # nothing is written again
    monkeypatch.setattr(prepare_module, "_write_tokenizer", None)
    shorter = dataclasses.replace(config, model=dataclasses.replace(config.model, seq_len=32))
    for again in (config, shorter):
        assert prepare(again, tmp_path).manifests == prepared.manifests


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"corpus.num_valid_tales": 41},
        {"corpus.name": "files", "corpus.path": str(ROOT / "tests" / "*.txt")},
        {"tokenizer.vocab_size": 600},
        {"tokenizer.sample_bytes": 1000},
        {"model.seq_len": 4096},
    ],
)
def test_windows_of_other_settings_are_refused_by_the_field_that_differs(tiny_tales, changes):
    _, workdir, _ = tiny_tales
    before = contents(workdir)
    with pytest.raises(ValueError, match=r"must|does not exist") as caught:
        prepare(build_config(**changes), workdir)
    message, (field, value) = str(caught.value), list(changes.items())[-1]
    assert f"{field}={value}" in message
    assert "\n" not in message
    if field == "model.seq_len":
        assert "must not exceed the windows of 208 tokens" in message
    assert contents(workdir) == before


def test_changed_files_are_noticed_and_missing_ones_are_not_needed(book, tmp_path):
    prepare(book, tmp_path / "work")
    (tmp_path / "texts" / "more.txt").write_text("More.")
    with pytest.raises(ValueError, match=r"corpus\.path=.* files was 1 and is 2; choose a new --workdir"):
        prepare(book, tmp_path / "work")
    (tmp_path / "texts" / "more.txt").unlink()
    (tmp_path / "texts").rename(tmp_path / "moved")
    before = contents(tmp_path / "work")
    prepare(book, tmp_path / "work")  # gone
    moved = book_config(tmp_path, **{"corpus.path": str(tmp_path / "moved")})
    prepare(moved, tmp_path / "work")  # the same files elsewhere
    assert contents(tmp_path / "work") == before


def test_a_given_tokenizer_is_copied_and_kept_to(tiny_tales, book, tmp_path):
    model = tiny_tales[1] / "tokenizer" / "tokenizer.model"
    settings = {"tokenizer.path": str(model), "tokenizer.vocab_size": 512}
    prepared = prepare(book_config(tmp_path, **settings), tmp_path / "work")
    assert (tmp_path / "work" / "tokenizer" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert "".join(sorted(iter_documents(prepared.tokens("valid"), prepared.tokenizer)))
    (tmp_path / "work" / "tokenizer" / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(ValueError, match="must be a SentencePiece model"):
        prepare(book_config(tmp_path, **settings), tmp_path / "work")
    with pytest.raises(ValueError, match=r"nowhere\.model does not exist"):
        prepare(book_config(tmp_path, **settings | {"tokenizer.path": "nowhere.model"}), tmp_path / "other")


def test_large_vocabularies_take_four_bytes(book, tmp_path, monkeypatch):
    init = Tokenizer.__init__

    def wide(self, *args):
        init(self, *args)
        self.dtype = np.dtype("<u4")  # as for more than 65,536 tokens, which would take long to learn

    monkeypatch.setattr(Tokenizer, "__init__", wide)
    prepared = prepare(book, tmp_path / "work")
    tokens, manifest = load_tokens(tmp_path / "work", "train")
    assert (tokens.dtype, manifest.dtype) == (np.dtype("<u4"), "<u4")
    texts = list(open_corpus(book.corpus, 0).documents("train"))
    assert list(iter_documents(tokens, prepared.tokenizer)) == texts


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(book, tmp_path, monkeypatch):
    real = prepare_module.atomic_writer

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[:1])
            raise OSError(errno.ENOSPC, "No space left on device")

    @contextmanager
    def full(path):
        with real(path) as file:
            yield Full(file) if path.name == "valid.bin" else file

    monkeypatch.setattr(prepare_module, "atomic_writer", full)
    with pytest.raises(OSError, match=r"workdir=.*: the disk is full; .* another --workdir$"):
        prepare(book, tmp_path / "work")
    left = contents(tmp_path / "work")
    assert sorted(left) == ["tokenizer/tokenizer.model", "windows/train.bin", "windows/train.json"]
    monkeypatch.undo()
    prepare(book, tmp_path / "work")  # goes on
    assert left.items() <= contents(tmp_path / "work").items()
    assert len(contents(tmp_path / "work")) == 7


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_a_killed_run_is_finished_by_the_next(book, tmp_path, delay):
    code = (
        "import sys, time; sys.path[:0] = ['.', 'tests', 'tests/data']\n"
        "from pathlib import Path; from test_prepare import *\n"
        "from tale_jax.data import encode; real = encode.count_words\n"
        "encode.count_words = lambda *text: time.sleep(0.02) or real(*text)\n"
        "print('ready', flush=True)\n"
        "prepare(book_config(Path(sys.argv[1])), Path(sys.argv[1]) / 'killed')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        windows = tmp_path / "killed" / "windows"
        while process.poll() is None and not (windows / "train.bin.partial").exists():
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    assert (windows / "train.bin.partial").exists()
    prepare(book, tmp_path / "killed")
    prepare(book, tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_bad_text_leaves_nothing_half_written(book, tmp_path):
    (tmp_path / "texts" / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt must be UTF-8"):
        prepare(book, tmp_path / "work")
    assert contents(tmp_path / "work") == {}


def test_a_workdir_that_cannot_be_written(book, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"workdir=.*/file/work cannot be written to .* another --workdir") as caught:
        prepare(book, tmp_path / "file" / "work")
    assert "\n" not in str(caught.value)


def test_a_prepared_workdir_is_only_read(book, tmp_path):
    """So another process may call `prepare` as well, once the first is done."""
    first = prepare(book, tmp_path / "work")
    before = snapshot(tmp_path / "work")
    second = prepare(book, tmp_path / "work")
    assert snapshot(tmp_path / "work") == before
    assert second.manifests == first.manifests
    assert second.tokenizer.model == first.tokenizer.model


def snapshot(folder):
    """When the files and folders were written, and which they are."""
    stats = {path: path.stat() for path in [folder, *folder.rglob("*")]}
    return {path: (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats.items()}


ENGLISH = collections.Counter({chr(97 + i): 1000 for i in range(26)})


def test_the_vocabulary_grows_with_the_text():
    sizes = [suitable_vocab_size(10**n, ENGLISH) for n in range(3, 12)]
    assert sizes == sorted(sizes) and (sizes[0], sizes[-1]) == (512, 8192)
    assert (suitable_vocab_size(10**6, ENGLISH), suitable_vocab_size(5 * 10**6, ENGLISH)) == (1024, 2048)
    many = collections.Counter({chr(0x4E00 + i): 100 for i in range(3000)})
    assert suitable_vocab_size(10**6, many) == 8192  # the least that has room for twice as many and the bytes
    assert suitable_vocab_size(10**6, ENGLISH | collections.Counter("éüñ")) == 1024  # too rare for tokens of their own


def test_the_vocabulary_of_a_corpus_is_that_of_its_training_text(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("".join(f"Chapter {n}. A fox went over hill {n}.\n\n" for n in range(40_000)))
    config = build_config(**{"corpus.name": "files", "corpus.path": str(tmp_path)})
    found, reason = with_vocab_size(config)
    assert found.tokenizer.vocab_size == 1024 and reason == "vocabulary 1,024: 1.6 MB of text"
    mine = build_config(**{"tokenizer.path": "mine.model", "corpus.name": "files", "corpus.path": str(tmp_path)})
    assert with_vocab_size(mine)[0] == mine
    monkeypatch.setattr(prepare_module, "MAX_VOCAB_SIZE", 512)
    found, reason = with_vocab_size(config)
    assert found.tokenizer.vocab_size == 512 and reason == "vocabulary 512: 0.3 MB or more of text"
