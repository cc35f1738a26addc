"""What is said of text that cannot be used is done, and it is read: commands run, settings set, files corrected."""

import bz2
import dataclasses
import functools
import gzip
import io
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from helpers import ROOT, build_config

from tale_jax.config import TokenizerConfig
from tale_jax.data import encode as encode_module
from tale_jax.data.corpus import SPLITS, open_corpus
from tale_jax.data.encode import encode
from tale_jax.data.loader import Batches, window_starts
from tale_jax.data.prepare import prepare
from tale_jax.data.readers import Cut, read_documents, texts
from tale_jax.data.text_files import find_files, read_text
from tale_jax.data.token_files import load_tokens
from tale_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer, check_tokenizer, train_tokenizer

WORDS = "The café’s façade was naïve, and the old crow said: go on and on.\n"


def refusal(call: Any, *arguments: Any, **keywords: Any) -> str:
    """The one line with which a call is refused."""
    with pytest.raises((ValueError, OSError)) as caught:
        call(*arguments, **keywords)
    line = str(caught.value)
    assert len(line.splitlines()) == 1, line
    return line


def run(command: str, code: int = 0) -> None:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert code is None or done.returncode == code, (command, done.stderr)


def rows(path: Path, field: str = "text") -> list[str]:
    return ["".join(blocks) for blocks in texts(path, field, "")]


def text_of(path: Path, encoding: str = "") -> str:
    return "".join(read_text(path, encoding))


# Rows.

CORRECTED = [
    ("a.jsonl", '["x"]\n', "must be a JSON object, not an array; give one object a line", '{"text": "x"}\n'),
    ("a.json", '["x"', "the array must end with ]", '["x"]'),
    ("a.json", '["x"] more', "has more after it; remove that", '["x"]'),
    ("a.json", '["x" "y"]', "must follow a comma; correct the file", '["x", "y"]'),
    ("a.json", '["x", 3]', "must be a JSON object or text, not a number; correct or remove it", '["x"]'),
    ("a.json", '["x", {"text": }]', "must be JSON", '["x"]'),
    ("a.json", '{"text":\n"x"}', "must be an array of rows, or one object a line", '[{"text": "x"}]'),
    ("a.json", '{"text":\n"x"}', "must be an array of rows, or one object a line", '{"text": "x"}\n'),
    ("a.csv", 'n,text\n1,"a" b\n', "close its quotes, and write a quote that", 'n,text\n1,"""a"" b"\n'),
    ("a.csv", "n,text\n1,a,b\n", "put quotes around a text with a comma in it", 'n,text\n1,"a,b"\n'),
    ("a.tsv", "n\ttext\n1\ta\tb\n", "with a tab in it, or remove the row", "n\ttext\n2\tb\n"),
    (
        "a.jsonl",
        '{"text": "\\ud83d"}\n',
        "must not hold half a surrogate pair; correct or remove it",
        '{"text": "é"}\n',
    ),
    ("a.jsonl", '{"text": 3, "body": "x"}\n', "must be text, but is a number", '{"text": "x"}\n'),
    ("a.jsonl.gz", '{"text"\n{"text": "x"}\n', "correct or remove it", '{"text": "x"}\n'),
]


@pytest.mark.parametrize(("name", "broken", "said", "corrected"), CORRECTED)
def test_rows_that_are_corrected_are_read(tmp_path, name, broken, said, corrected):
    path = tmp_path / name
    write = (lambda text: path.write_bytes(gzip.compress(text.encode()))) if name.endswith(".gz") else path.write_text
    write(broken)
    assert said in refusal(rows, path)
    write(corrected)
    assert rows(path)
    # A line that is told to be removed by a command, and a field that is told to be another.
    path = tmp_path / "b.jsonl"
    path.write_text('{"text": "kept"}\n{"text"\n{"text": "too"}\n')
    run(refusal(rows, path).partition("remove it: ")[2])
    assert rows(path) == ["kept", "too"]
    path.write_text('{"n": 3, "body": "x"}\n')
    listed = re.search(r"which has (.*); name one of these", refusal(rows, path))
    assert listed and listed[1].split(", ")[1] == "body" and rows(path, "body") == ["x"]
    assert "name another field" in refusal(rows, path, "n")


def test_parquet_that_is_written_again_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, good = tmp_path / "a.parquet", pyarrow.table({"text": ["one", "two"]})

    def again() -> None:
        parquet.write_table(good, path)
        assert rows(path) == ["one", "two"]

    again()
    whole = path.read_bytes()
    for size in (4, 20, len(whole) // 2):
        path.write_bytes(whole[:size])
        assert refusal(rows, path).endswith("download or write it again")
        again()
    path.write_bytes(b"no table at all")
    assert refusal(rows, path).endswith("but is not a parquet file; download or write it again")
    again()
    damaged = bytearray(whole)
    damaged[4:40] = bytes(36)  # pages, not the footer
    path.write_bytes(damaged)
    assert "is damaged after row 0" in refusal(rows, path)
    again()
    bad = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), path)
    assert "row 2: text cannot be read" in refusal(rows, path)
    parquet.write_table(pyarrow.table({"text": bad}).slice(0, 1), path)  # without it
    assert rows(path) == ["fine"]


def installed_by(line: str) -> list[str]:
    """What the command of a message installs: the libraries of the extras that it names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.search(r"(?:EXTRAS=|pip install -e [^\[]*\[)([\w,-]+)", line)
    assert named, line
    return [library for extra in named[1].strip(",").split(",") for library in extras[extra]]


def test_a_library_that_is_installed_as_told_reads(tmp_path, monkeypatch):
    """What `pip install` is told to install is what was missing: with it the same file is read."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "a.parquet")
    (tmp_path / "a.txt.zst").write_bytes(pyarrow.compress(b"text", codec="zstd", asbytes=True))
    for name in ("a.parquet", "a.txt.zst"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "pyarrow", None)
            without.setitem(sys.modules, "compression", None)
            line = refusal(rows, tmp_path / name)
        assert any(library.startswith("pyarrow") for library in installed_by(line))
        assert rows(tmp_path / name)
    if shutil.which("unzstd"):
        run(line.partition(", or ")[2])
        assert text_of(tmp_path / "a.txt") == "text"
    monkeypatch.setitem(sys.modules, "datasets", None)
    hub = {"corpus.name": "hub", "corpus.hub_name": "a/b"}
    line = refusal(open_corpus, build_config(**hub).corpus, 0)
    assert any(library.startswith("datasets") for library in installed_by(line))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # not made by `make env`
    line = refusal(open_corpus, build_config(**hub).corpus, 0)
    assert "-m pip install -e" in line and any(library.startswith("datasets") for library in installed_by(line))
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"Story {number}.\n")
    files = {"corpus.name": "files", "corpus.path": str(folder)}  # "or download it and set corpus.path"
    assert list(open_corpus(build_config(**files).corpus, 0).documents("train"))


def test_a_dataset_of_the_hub_with_other_settings(monkeypatch):
    class Datasets:
        @staticmethod
        def load_dataset(name, config, *, split, streaming):
            if name == "no/such":
                raise ConnectionError("not found")
            if config is None or split not in ("train", "validation"):
                raise ValueError(f"Unknown split {split} or config {config}")
            return [{"text": f"{split} {n}"} for n in range(50)]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)

    def corpus(**settings):
        changes = {f"corpus.{name}": value for name, value in settings.items()}
        corpus = open_corpus(build_config(**{"corpus.name": "hub"} | changes).corpus, 0)
        return {split: list(corpus.documents(split)) for split in SPLITS}

    assert "check its name and the network" in refusal(corpus, hub_name="no/such")
    line = refusal(corpus, hub_name="a/b", train_split="trian")
    assert line.endswith("see corpus.hub_config and corpus.*_split")
    assert "corpus.hub_config" in refusal(corpus, hub_name="a/b")
    assert "split test" in refusal(corpus, hub_name="a/b", hub_config="x")
    assert corpus(hub_name="a/b", hub_config="x", test_split="")["valid"][0] == "validation 0"


# Bytes.


def zst(data: bytes) -> bytes:
    return pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True)


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", data)
    return file.getvalue()


def tarred(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def table(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [data.decode()]}), file)
    return file.getvalue()


PACK = {"gz": gzip.compress, "zst": zst, "bz2": bz2.compress, "xz": lzma.compress, "zip": zipped, "tar": tarred}
PACK |= {"parquet": table, "plain": bytes, "cp1252": lambda data: data.decode().encode("cp1252")}
PACK |= {"utf-16": lambda data: data.decode().encode("utf-16")}
PACK |= {"nul": lambda data: data + b"\0", "stray": lambda data: data + b"\xff"}
NAMES = ("my book.txt", "my book.txt.gz", "my book.txt.zst", "my book.txt.bz2", "my book.txt.xz")


def packed(data: bytes, kinds: tuple[str, ...]) -> bytes:
    return functools.reduce(lambda data, kind: PACK[kind](data), kinds, data)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kinds",
    [(kind,) for kind in PACK]
    + [("gz", "gz"), ("zst", "gz"), ("gz", "zst"), ("zip", "xz"), ("tar", "gz"), ("parquet", "gz"), ("parquet", "xz")]
    + [("cp1252", "gz"), ("utf-16", "bz2"), ("nul", "gz"), ("stray", "xz")],
    ids="-".join,
)
def test_the_command_that_a_file_is_refused_with_makes_text_of_it(tmp_path, name, kinds):
    """Whatever a file is and is called: the command in the refusal, and in the next one, if there is one."""
    path = tmp_path / name
    text = WORDS * 100
    path.write_bytes(packed(text.encode(), kinds))
    for _ in range(4):
        found = find_files(str(tmp_path)).files
        assert len(found) == 1, found  # nothing is lost, nothing is there twice
        try:
            documents = [document.text for document in read_documents(found, "text", "", Cut())]
        except ValueError as error:
            line = str(error)
        else:
            assert documents == [text]
            return
        command = re.search(r"(?:convert it|decompress it|what it is|out): (.*)|says; (mv .*)", line)
        assert command, line
        for program in re.findall(r"(?:^|\| )(\w+)", command[1] or command[2]):
            if not shutil.which(program):
                pytest.skip(f"no {program} here")
        run(command[1] or command[2], code=None)
    pytest.fail(f"still refused: {line}")


def test_a_damaged_file_is_compressed_again(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(WORDS.encode())[:-9])
    assert "download or compress it again" in refusal(text_of, path)
    path.write_bytes(gzip.compress(WORDS.encode()))
    assert text_of(path) == WORDS


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n" * 99, bytes(range(256)) * 20, b"\x00\x01\x02" * 999])
def test_what_is_no_text_is_removed_as_told(tmp_path, data):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"Story {number}, which goes on.\n")
    (tmp_path / "x.txt").write_bytes(data)
    config = build_config(**{"corpus.name": "files", "corpus.path": str(tmp_path)})
    line = refusal(list, open_corpus(config.corpus, 0).documents("train"))
    assert "remove it" in line and "x.txt" in line
    (tmp_path / "x.txt").unlink()
    assert list(open_corpus(config.corpus, 0).documents("train"))


def test_an_encoding_that_is_named_reads_the_text(tmp_path):
    path = tmp_path / "a.txt"
    for encoding in ("cp1252", "utf-16", "utf-32-le"):
        path.write_bytes((WORDS * 40).encode(encoding))
        named = re.search(r"--config\.(corpus\.encoding)=([\w-]+)", refusal(text_of, path))
        assert named and text_of(path, build_config(**{named[1]: named[2]}).corpus.encoding) == WORDS * 40
    path.write_bytes((WORDS * 40).encode("utf-16-le"))
    assert "set the right --config.corpus.encoding" in refusal(text_of, path, "cp437")
    assert text_of(path, "utf-16") == WORDS * 40
    path.write_bytes("日本".encode("shift_jis") + b"\x81")
    assert 'set the right --config.corpus.encoding, or "" for UTF-8' in refusal(text_of, path, "ascii")
    path.write_bytes("日本".encode("shift_jis"))
    assert text_of(path, "shift_jis") == "日本"


# Paths.


def test_paths_that_are_corrected_are_read(tmp_path, monkeypatch):
    book, folder = tmp_path / "book.doc", tmp_path / "notes"
    folder.mkdir()
    book.write_text("x")
    (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty.txt").touch()
    os.mkfifo(tmp_path / "pipe.txt")

    def found(name: Any) -> list[Path]:
        return find_files(str(tmp_path / name)).files

    run(refusal(found, "book.doc").partition("if it is text: ")[2])
    assert found("book.doc.txt") == [tmp_path / "book.doc.txt"]
    near = re.search(r"did you mean (.*)\?; give a file, a folder or a glob", refusal(found, "book.dox.txt"))
    assert near and found(near[1]) == [tmp_path / "book.doc.txt"]
    assert "give a file, a folder or a glob" in refusal(found, "a\0b")
    assert "add text" in refusal(found, "notes")
    (folder / "note.md").write_text("x")
    assert found("notes") == found("note?") == found("notes/note.md")
    assert "is a link to nothing" in refusal(found, "lost.txt")
    (tmp_path / "nowhere").write_text("x")
    assert found("lost.txt")
    assert "give one with text" in refusal(found, "empty.txt")
    (tmp_path / "empty.txt").write_text("x")
    assert found("empty.txt")
    assert "write it to a file first" in refusal(found, "pipe.txt")
    run(f"cd '{tmp_path}' && (echo x > pipe.txt &) && cat pipe.txt > written.txt")
    assert found("written.txt")
    monkeypatch.delenv("HOME")
    tilde = "~nobody-of-this-name/notes"
    assert "write it out, or as ./" in refusal(find_files, tilde)
    assert find_files(tilde.replace("~nobody-of-this-name", str(tmp_path))).files


# Corpora.


def test_a_corpus_with_too_little_for_its_splits_gets_what_it_is_told(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"

    def read(**settings: Any) -> list[str]:
        changes = {f"corpus.{name}": value for name, value in settings.items()}
        config = build_config(**{"corpus.name": "files", "corpus.path": str(path)} | changes)
        corpus = open_corpus(config.corpus, 0)
        return [text for split in SPLITS for text in corpus.documents(split)]

    def write(count: int, text: str = "Row {} is a row.") -> None:
        path.write_text("".join(json.dumps({"text": text.format(n)}) + "\n" for n in range(count)))

    write(3)
    needed = re.search(r"at least ([\d,]+) bytes of text \(or (\d+) documents\).*; add text$", refusal(read))
    assert needed
    write(int(needed[2]))
    assert read()
    write(1, "word " * (int(needed[1].replace(",", "")) // 5))
    assert "the same text over and over; add text that does not repeat itself" in refusal(read)
    path.write_text(json.dumps({"text": " ".join(map(str, range(1400)))}))
    assert read()
    write(9, " \n")
    assert refusal(read).endswith("holds no text but white space; add text")
    write(50)
    raised = re.search(
        r"set --config\.corpus\.max_train_bytes=(\d+) or more \(it is 20\)", refusal(read, max_train_bytes=20)
    )
    assert raised and read(max_train_bytes=int(raised[1]))
    # Cut by hash: hub datasets, and TinyStories.
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>".join(f"Story {n}." for n in range(12)))
    for held_out, way, other in ((0.001, "raise", 0.3), (0.499, "lower", 0.3)):
        line = refusal(read, name="tinystories", held_out=held_out)
        assert f"or {way} corpus.held_out={held_out}" in line, line
        assert read(name="tinystories", held_out=other)
    path = tmp_path / "published"
    path.mkdir()
    (path / "TinyStories-train.txt").write_text("One.<|endoftext|>Two.")
    (path / "TinyStories-valid.txt").write_text("Three.")
    line = refusal(read, name="tinystories")
    assert line.endswith("split; give more text"), line  # of a published split held_out changes nothing
    (path / "TinyStories-valid.txt").write_text("<|endoftext|>".join(f"Story {n}." for n in range(12)))
    assert read(name="tinystories")


def test_published_files_that_are_put_where_it_is_told(tmp_path):
    folder = tmp_path / "wikitext"

    def read() -> list[str]:
        config = build_config(**{"corpus.name": "wikitext2", "corpus.path": str(folder)})
        return list(open_corpus(config.corpus, 0).documents("train"))

    assert refusal(read).endswith("does not exist; give the folder that holds wikitext2")
    folder.mkdir()
    for split in ("train", "valid", "test"):
        names = re.search(r"must be a folder that holds (\S+) or (\S+);", refusal(read))
        assert names and names[1] == f"{split}.txt"
        (folder / names[1]).touch()
        assert f"{names[1]} must not be empty; download it again" in refusal(read)
        (folder / names[1]).write_text(" \n = Bears = \n \n Text . \n")
    assert read()


def test_text_that_changed_while_it_was_read_is_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"Row {n} is a row."}) + "\n" for n in range(40)))
    config = build_config(**{"corpus.name": "files", "corpus.path": str(path)})
    documents = open_corpus(config.corpus, 0).documents("train")
    next(documents)
    kept = path.read_text().splitlines(keepends=True)[:20]
    again = open_corpus(config.corpus, 0)
    path.write_text("".join(kept))
    assert refusal(list, again.documents("train")).endswith("run this once more")
    assert list(open_corpus(config.corpus, 0).documents("train"))


# Tokenizers.

SENTENCES = [f"The fox number {n} went over hill {n * 7 % 13}, far away – and slept." for n in range(400)]


@functools.cache
def tokenizer_model(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        minloglevel=4,
        **({"vocab_size": 340, "model_type": "bpe", "byte_fallback": True, "character_coverage": 1.0} | options),
    )
    return model.getvalue()


def test_a_tokenizer_that_cannot_be_used_is_replaced_as_told(tmp_path):
    whole = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    path, texts = tmp_path / "my.model", tmp_path / "texts"
    texts.mkdir()
    (texts / "book.txt").write_text("\n\n".join(SENTENCES))

    def prepared(workdir: str, **changes: Any) -> Any:
        settings = {"corpus.name": "files", "corpus.path": str(texts), "model.seq_len": 32}
        settings |= {"tokenizer.path": str(path), "tokenizer.vocab_size": 340} | changes
        return prepare(build_config(**settings), tmp_path / workdir)

    line = refusal(prepared, "a")
    assert line == f"{path} does not exist; give a SentencePiece .model file (launch/prepare.py makes one)"
    path.write_bytes(b"no model")
    assert refusal(prepared, "a").endswith("must be a SentencePiece model; give a .model file")
    for broken in ({"bos_id": -1}, {"eos_id": -1}, {}):  # the last alters text
        path.write_bytes(tokenizer_model(**broken))
        line = refusal(prepared, "a")
        assert '--config.tokenizer.path=""' in line
    assert "byte_fallback, identity normalisation and remove_extra_whitespaces=False" in line
    assert prepared("b", **{"tokenizer.path": ""}).tokenizer.vocab_size == 340
    path.write_bytes(tokenizer_model(**whole))
    size = re.search(
        r"try --config\.tokenizer\.vocab_size=(\d+)", refusal(prepared, "a", **{"tokenizer.vocab_size": 4096})
    )
    assert size and prepared("a", **{"tokenizer.vocab_size": int(size[1])}).tokenizer.model == path.read_bytes()
    made = tmp_path / "b" / "tokenizer" / "tokenizer.model"  # "launch/prepare.py makes one"
    assert prepared("c", **{"tokenizer.path": str(made)}).tokenizer.model == made.read_bytes()
    check_tokenizer(SentencePieceTokenizer(tokenizer_model(**whole)), TokenizerConfig(340, "my.model", 0))
    assert "half a surrogate pair; remove it" in refusal(Tokenizer.load(made).encode, "half \ud83d")
    assert len(Tokenizer.load(made).encode("half "))


@pytest.mark.parametrize("texts", [[], ["\t\0"], ["\0"]])
def test_text_without_characters_gets_some(texts):
    config = TokenizerConfig(268, "", 10_000)
    assert "give text with words in corpus.path" in refusal(train_tokenizer, texts, config)
    train_tokenizer([*texts, "words"], config)


def test_text_without_characters_to_fill_a_vocabulary_gets_some():
    config = TokenizerConfig(300, "", 10_000)
    for text in ("\u2581", " ", "\t \t"):
        try:
            train_tokenizer([text], config)
        except ValueError as error:
            line = str(error)
        assert "give" in line
    train_tokenizer(SENTENCES, config)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return train_tokenizer(SENTENCES, TokenizerConfig(320, "", 1 << 20))


@pytest.mark.slow
def test_encoding_that_was_killed_is_run_again(tokenizer, monkeypatch):
    monkeypatch.setattr(encode_module, "BATCH_CHARS", 1_000)

    def documents(kill: bool):
        yield from SENTENCES
        listed = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout
        for line in listed.splitlines() if kill else ():
            pid, parent, args = line.split(None, 2)
            if int(parent) == os.getpid() and "spawn_main" in args:
                os.kill(int(pid), signal.SIGKILL)
        yield from SENTENCES

    assert refusal(lambda: list(encode(documents(True), tokenizer, None, cores=2))).endswith(
        "run the same command again"
    )
    assert sum(batch.documents for batch in encode(documents(False), tokenizer, None, cores=1)) == 2 * len(SENTENCES)


# Prepared text.


def test_prepared_text_goes_on_as_it_is_told(tmp_path):
    texts, workdir = tmp_path / "texts", tmp_path / "work"
    texts.mkdir()
    (texts / "book.txt").write_text("\n\n".join(SENTENCES))

    def prepared(folder: Path = workdir, **changes: Any) -> Any:
        settings = {"corpus.name": "files", "corpus.path": str(texts), "model.seq_len": 64}
        return prepare(build_config(**settings | {"tokenizer.vocab_size": 320} | changes), folder)

    line = refusal(load_tokens, workdir, "train")
    assert line.endswith("run launch/prepare.py on it first")
    first = prepared()
    assert len(load_tokens(workdir, "train")[0])
    # Longer windows than were prepared.
    advised = re.search(
        r"try --config\.model\.seq_len=(\d+), or a new --workdir", refusal(prepared, **{"model.seq_len": 100})
    )
    assert advised and prepared(**{"model.seq_len": int(advised[1])})
    assert prepared(tmp_path / "longer", **{"model.seq_len": 100})
    # Another setting: the value of then, a new workdir, or windows that are removed.
    line = refusal(prepared, **{"corpus.held_out": 0.2})
    value = re.search(r"corpus\.held_out=0\.2 must be ([\d.]+), as in the windows", line)
    assert value and prepared(**{"corpus.held_out": float(value[1])})
    removed = re.search(r"choose a new --workdir, or remove (\S+) to prepare again", line)
    assert removed and prepared(tmp_path / "other", **{"corpus.held_out": 0.2})
    shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(removed[1].replace(str(workdir), str(tmp_path / "copy")))
    assert prepared(tmp_path / "copy", **{"corpus.held_out": 0.2})
    (tmp_path / "copy" / "checkpoints").mkdir()
    assert refusal(prepared, tmp_path / "copy").endswith("choose a new --workdir")  # weights were made with these
    # Another tokenizer.
    model = workdir / "tokenizer" / "tokenizer.model"
    kept = model.read_bytes()
    model.write_bytes(tokenizer_model())
    line = refusal(prepared)
    assert "must be the one that" in line
    shutil.rmtree(re.search(r"remove (\S+) to prepare again", line)[1])
    assert prepared().tokenizer.model == kept
    # Files that are damaged.
    for name, damage in (("train.json", b"{"), ("valid.json", b"[]"), ("train.bin", b"x")):
        (workdir / "windows" / name).write_bytes(damage)
        line = refusal(load_tokens, workdir, name.partition(".")[0])
        path = Path(re.search(r"remove (\S+) and prepare again", line)[1])
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        again = prepared()
        assert {split: dataclasses.replace(m) for split, m in again.manifests.items()} == first.manifests
        assert len(load_tokens(workdir, name.partition(".")[0])[0])
    values = json.loads((workdir / "windows" / "train.json").read_text()) | {"format_version": 0}
    (workdir / "windows" / "train.json").write_text(json.dumps(values))
    line = refusal(prepared)
    assert "must have format_version" in line
    shutil.rmtree(re.search(r"remove (\S+) and prepare again", line)[1])
    assert prepared().manifests == first.manifests
    # Text that has changed.
    (texts / "more.txt").write_text("\n\n".join(reversed(SENTENCES)))
    line = refusal(prepared)
    setting = re.search(r"set --config\.(corpus\.changed)=(\w+) to prepare it again and go on", line)
    assert setting and prepared(**{setting[1]: setting[2]}).tokenizer.model == kept
    # A folder that cannot be written.
    (tmp_path / "file").touch()
    assert refusal(prepared, tmp_path / "file" / "work").endswith("choose another --workdir")
    assert prepared(tmp_path / "another")


# Batches.

TOKENS = np.arange(1005, dtype=np.uint16) % 300


@pytest.mark.parametrize("bos_id", [None, 1])
@pytest.mark.parametrize(("batch_size", "seq_len"), [(101, 10), (4, 2000), (1004, 3000), (7, 1004)])
def test_batches_of_the_size_that_is_advised(bos_id, batch_size, seq_len):
    settings = {"batch_size": batch_size, "seq_len": seq_len}

    def make() -> Batches:
        return Batches(TOKENS, window_starts(TOKENS, settings["seq_len"], bos_id), **settings, seed=0)

    for _ in range(3):
        try:
            batches = make()
        except ValueError as error:
            advised = re.search(r"or try --config\.(?:model\.)?(batch_size|seq_len)=(\d+)$", str(error))
            settings[advised[1]] = int(advised[2])
        else:
            assert next(batches).shape == (settings["batch_size"], settings["seq_len"] + 1)
            batches.close()
            break
    else:
        pytest.fail("the advice did not help")
