"""Token files hold the text exactly, are reused, refused or finished, and are never left half-written."""

import collections
import dataclasses
import errno
import json
import random
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
from tale_jax.data.prepare import describe, loss_interval, prepare, suitable_vocab_size, with_vocab_size
from tale_jax.data.tales import grammar as tales
from tale_jax.data.token_files import document_starts, iter_documents, load_tokens
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.utils.locks import LOCK_FILE

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
    return {
        str(p.relative_to(workdir)): p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.name != LOCK_FILE
    }


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
    with pytest.raises(ValueError, match=r"corpus\.path=.* files was 1 and is 2; set --config.corpus.changed=continue"):
        prepare(book, tmp_path / "work")
    (tmp_path / "texts" / "more.txt").unlink()
    (tmp_path / "texts").rename(tmp_path / "moved")
    before = contents(tmp_path / "work")
    prepare(book, tmp_path / "work")  # gone
    moved = book_config(tmp_path, **{"corpus.path": str(tmp_path / "moved")})
    prepare(moved, tmp_path / "work")  # the same files elsewhere
    assert contents(tmp_path / "work") == before


def test_another_text_of_the_same_names_and_sizes_is_refused(book, tmp_path):
    prepare(book, tmp_path / "work")
    (tmp_path / "texts" / "book.txt").write_text(BOOK.replace("fox", "cow"))
    with pytest.raises(ValueError, match=r"but contents was \w+ and is \w+; set --config.corpus.changed=continue"):
        prepare(book, tmp_path / "work")


def test_changed_text_is_prepared_again_where_that_is_asked_for(book, tmp_path, capsys):
    first = prepare(book, tmp_path / "work")
    more = "".join(f"Page {n}.\n\nThe owl number {n} slept under tree {n * 5 % 11}.\n\n" for n in range(900))
    (tmp_path / "texts" / "more.txt").write_text(more)
    go_on = book_config(tmp_path, **{"corpus.changed": "continue"})
    second = prepare(go_on, tmp_path / "work", tmp_path / "log.txt")
    assert "prepared again, with the same tokenizer; the data position starts anew" in capsys.readouterr().err
    assert "prepared again" in (tmp_path / "log.txt").read_text()
    assert second.tokenizer.model == first.tokenizer.model
    texts = list(open_corpus(go_on.corpus, 0).documents("train"))
    assert list(iter_documents(second.tokens("train"), second.tokenizer)) == texts
    for split in SPLITS:
        (replaced,) = second.manifests[split].replaced
        assert replaced["files"] == 1 and replaced["tokens"] == first.manifests[split].tokens
        assert replaced["contents"] == first.manifests[split].corpus["contents"]
    before = snapshot(tmp_path / "work")
    assert prepare(go_on, tmp_path / "work").manifests == second.manifests == prepare(book, tmp_path / "work").manifests
    assert snapshot(tmp_path / "work") == before
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size=400 must be 320"):
        (tmp_path / "texts" / "more.txt").unlink()
        prepare(book_config(tmp_path, **{"corpus.changed": "continue", "tokenizer.vocab_size": 400}), tmp_path / "work")
    assert snapshot(tmp_path / "work") == before


def test_a_kill_while_changed_text_is_prepared_is_made_good(book, tmp_path, monkeypatch):
    prepare(book, tmp_path / "work")
    (tmp_path / "texts" / "more.txt").write_text(BOOK.replace("fox", "owl"))
    go_on = book_config(tmp_path, **{"corpus.changed": "continue"})
    real = prepare_module._write_split

    def killed(corpus, split, *rest):
        if split == "test":
            raise KeyboardInterrupt
        return real(corpus, split, *rest)

    monkeypatch.setattr(prepare_module, "_write_split", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(go_on, tmp_path / "work")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"corpus\.changed=continue"):
        prepare(book, tmp_path / "work")
    prepare(go_on, tmp_path / "work")
    prepare(go_on, tmp_path / "whole")
    found, wanted = (contents(tmp_path / name) for name in ("work", "whole"))
    assert {name: found[name] for name in found if name.endswith("train.json")} != {}
    manifests = prepare(go_on, tmp_path / "work").manifests
    assert len({manifest.corpus["contents"] for manifest in manifests.values()}) == 1
    assert manifests["valid"].documents == json.loads(wanted["windows/valid.json"])["documents"]


def test_windows_of_version_0_2_are_still_read(book, tmp_path):
    """It knew no contents, no encoding, and cut documents by another rule."""
    prepared = prepare(book, tmp_path / "work")
    for split in SPLITS:
        path = tmp_path / "work" / "windows" / f"{split}.json"
        values = json.loads(path.read_text())
        for name in ("contents", "split_rule", "encoding"):
            del values["corpus"][name]
        for name in ("texts", "seen_share", "replaced", "sha256", "digest"):
            del values[name]
        path.write_text(json.dumps(values | {"format_version": 1}))
    again = prepare(book, tmp_path / "work")
    assert again.manifests["train"].tokens == prepared.manifests["train"].tokens
    (tmp_path / "work" / "windows" / "test.json").unlink()
    with pytest.raises(ValueError, match="split_rule was None and is 2"):  # splits of two rules would overlap
        prepare(book, tmp_path / "work")


def test_the_share_of_held_out_text_that_training_has_is_reported(tmp_path):
    (tmp_path / "texts").mkdir()
    rng = random.Random(0)
    lines = ["".join(rng.choice("abcdefgh ") for _ in range(70)) for _ in range(400)]
    rows = [" ".join(rng.sample(lines, 12)) for _ in range(300)]
    (tmp_path / "texts" / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    prepared = prepare(book_config(tmp_path, **{"corpus.held_out": 0.1}), tmp_path / "work")
    assert prepared.manifests["train"].seen_share is None
    for split in ("valid", "test"):
        share = prepared.manifests[split].seen_share
        assert share == pytest.approx(21 / 71, abs=0.1)  # of 71 bytes with their space, 21 places begin a run of a line
        assert f"{share:.1%} of its runs of 50 bytes occur in the training split" in describe(prepared.manifests[split])
    (tmp_path / "work" / "windows" / "valid.json").unlink()  # as if a run had been killed after train
    again = prepare(book_config(tmp_path, **{"corpus.held_out": 0.1}), tmp_path / "work")
    assert again.manifests["valid"].seen_share == prepared.manifests["valid"].seen_share


def test_a_small_valid_split_says_how_little_it_tells(book, tmp_path):
    book = book_config(tmp_path, **{"corpus.held_out": 0.2})
    manifest = prepare(book, tmp_path / "work").manifests["valid"]
    assert manifest.texts == 1 < manifest.documents
    line = describe(manifest)
    assert f"{manifest.documents} documents (passages of 1 text)" in line
    assert f"known to about ±{loss_interval(manifest):.1g} nats/token, and says little about any other text" in line
    large = dataclasses.replace(manifest, documents=4000, tokens=4_000_000)
    assert "known to" not in describe(large)
    assert "1 document," in describe(dataclasses.replace(manifest, documents=1))


@pytest.mark.parametrize("size", [5_000, 6_000, 20_000, 70_000, 300_000])
def test_one_small_file_fills_all_three_splits(tmp_path, size):
    (tmp_path / "texts").mkdir()
    rng, words = random.Random(size), BOOK.split()[:200]
    text = "".join(f"{' '.join(rng.choices(words, k=12))}.\n\n" for _ in range(size // 40))
    (tmp_path / "texts" / "book.txt").write_text(text[:size])
    config = book_config(tmp_path, **{"tokenizer.vocab_size": 300})
    manifests = prepare(config, tmp_path / "work").manifests
    assert sum(manifest.bytes for manifest in manifests.values()) == size
    assert all(manifest.documents for manifest in manifests.values())
    assert manifests["train"].bytes > size / 2
    (tmp_path / "texts" / "book.txt").write_text(text[:4_900])
    with pytest.raises(ValueError, match="must hold at least 5,000 bytes of text"):
        prepare(config, tmp_path / "other")


def test_no_bar_goes_beyond_its_total(tmp_path, monkeypatch):
    done = collections.Counter()

    class Progress(prepare_module.Progress):
        def advance(self, count=1):
            done[self] += count
            assert not self._total or done[self] <= self._total
            super().advance(count)

    monkeypatch.setattr(prepare_module, "Progress", Progress)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book.txt").write_bytes(BOOK.encode("utf-16"))
    (tmp_path / "texts" / "rows.csv").write_text("text\n" + "".join(f"row {n} of a table\n" for n in range(500)))
    prepare(book_config(tmp_path, **{"corpus.encoding": "utf-16"}), tmp_path / "work")
    assert len(done) == 5


def test_what_was_not_read_is_said_and_logged(book, tmp_path, capsys):
    (tmp_path / "texts" / "cover.png").write_bytes(b"x")
    workdir = tmp_path / "texts" / "run"
    prepare(book, workdir, workdir / "log.txt")
    err, log = capsys.readouterr().err, (workdir / "log.txt").read_text()
    for line in ("1 file was not read: 1 .png (hidden files are left out)", f"{workdir} is the folder of a run"):
        assert line in err and line in log
    before = snapshot(workdir / "windows")
    prepare(book, workdir, workdir / "log.txt")  # log.txt beside the texts is no text
    assert snapshot(workdir / "windows") == before


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
    stats = {path: path.stat() for path in [folder, *folder.rglob("*")] if path.name != LOCK_FILE}
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
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "d.txt").write_text(" ".join(str(random.Random(n).randrange(10)) for n in range(70_000)))
    digits = build_config(**{"corpus.name": "files", "corpus.path": str(tmp_path / "digits")})
    found, _ = with_vocab_size(digits, tmp_path / "work")
    assert found.tokenizer.vocab_size == 281  # digits fill no more
    monkeypatch.setattr(prepare_module, "MAX_VOCAB_SIZE", 512)
    found, reason = with_vocab_size(config)
    assert found.tokenizer.vocab_size == 512 and reason == "vocabulary 512: 0.3 MB or more of text"
