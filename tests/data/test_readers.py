"""Texts become documents that, joined, are the texts; rows of every kind are read; what is wrong with one is a line."""

import bz2
import gzip
import itertools
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tale_jax.data import readers
from tale_jax.data.readers import Cut, read_documents, texts


def rows(path, field="text", encoding=""):
    return ["".join(blocks) for blocks in texts(path, field, encoding)]


def says(path, *parts, field="text"):
    """The error in reading a file, which must be one line with its name and all parts."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        rows(path, field)
    message = str(caught.value)
    assert "\n" not in message
    for part in (path.name, *parts):
        assert part in message, message
    return message


@given(
    st.lists(
        st.sampled_from([b"a word ", b"\n", b"\n \n", b"\n\n\n", "né".encode(), b"\r\n\r\n", b"x" * 90]), max_size=60
    ),
    st.integers(5, 80),
    st.integers(1, 300),
)
def test_passages_join_to_the_file_and_do_not_depend_on_the_blocks(parts, target, block):
    data = b"".join(parts)
    passages = list(readers.split_passages(iter([data] if data else []), target))
    blocks = (data[start : start + block] for start in range(0, len(data), block))
    assert passages == list(readers.split_passages(blocks, target))
    assert b"".join(passages) == data
    for passage in passages:
        passage.decode()
        assert 0 < len(passage) <= 2 * target


@pytest.mark.parametrize(
    ("text", "passages"),
    [
        ("aaaa bbbb\n\ncccc dddd", ["aaaa bbbb\n\n", "cccc dddd"]),  # at a blank line
        ("a" * 9 + "\n" + "b" * 9, ["a" * 9 + "\n", "b" * 9]),  # at a line end
        ("a" * 15 + " " + "b" * 15, ["a" * 15 + " ", "b" * 15]),  # at the last space
        ("a" * 36, ["a" * 20, "a" * 16]),  # anywhere
        ("a" * 19 + "é" * 4, ["a" * 19, "é" * 4]),  # but not inside a character
    ],
)
def test_passages_end_where_a_reader_would_pause(text, passages):
    assert [passage.decode() for passage in readers.split_passages(iter([text.encode()]), 10)] == passages


PARAGRAPHS = st.lists(st.text("abcdefgh ", min_size=8, max_size=60), min_size=120, max_size=160)


@given(PARAGRAPHS, st.integers(0, 100), st.text("xyz ", min_size=1, max_size=90))
def test_two_printings_are_cut_alike(paragraphs, place, foreword):
    """Other line ends, and a paragraph more: passages that are far from it are the same ones."""
    numbered = [f"{n} {paragraph}" for n, paragraph in enumerate(paragraphs)]
    first = "\n\n".join(numbered)
    second = "\r\n\r\n".join([*numbered[:place], foreword, *numbered[place:]])
    cuts = [
        {readers.words_only(passage) for passage in readers.split_passages(iter([text.encode()]), 256)}
        for text in (first, second)
    ]
    assert len(cuts[0] & cuts[1]) >= len(cuts[0]) - 12


@pytest.mark.parametrize(
    ("size", "low", "high"), [(32_001, 1_024, 4_096), (128 * 5_000, 2_048, 8_192), (128 * 40_000, 8_192, 32_768)]
)
def test_a_long_file_becomes_about_128_passages_of_a_useful_size(tmp_path, size, low, high):
    text = "".join(f"word {n}\n\n" for n in range(size // 8))[:size]
    (tmp_path / "book.txt").write_text(text)
    passages = [document.text for document in read_documents([tmp_path / "book.txt"], "text", "", Cut())]
    assert "".join(passages) == text
    assert all(low <= len(passage) <= high for passage in passages[:-1])
    (tmp_path / "book.txt").write_text(text[:32_000])
    assert [d.text for d in read_documents([tmp_path / "book.txt"], "text", "", Cut())] == [text[:32_000]]


def test_long_rows_are_cut_too_and_blank_ones_are_left_out(tmp_path):
    long = "".join(f"paragraph {n}\n\n" for n in range(9000))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (long, " \n", "x")))
    documents = list(read_documents([tmp_path / "a.jsonl"], "text", "", Cut()))
    assert "".join(d.text for d in documents if d.text_index == 0) == long
    assert documents[-1] == ("x", 1)


@pytest.mark.parametrize("block", [1, 7, 16, 1 << 20])
def test_stories_do_not_depend_on_the_blocks(block):
    text = "\n One é.\n<|endoftext|><|endoftext|> \n<|endoftext|>Two < and more.\nThe end"
    blocks = (text[start : start + block] for start in range(0, len(text), block))
    assert list(readers.stories(blocks)) == ["One é.", "Two < and more.\nThe end"]


# Rows.

STRINGS = st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda t: "\0" not in t), max_size=8)


def kept(strings):
    return [text for s in strings if s.strip() and (text := s.lstrip("\ufeff"))]


@given(STRINGS, st.sampled_from([".jsonl", ".ndjson", ".json", "array", "strings", "pretty"]), st.booleans())
def test_any_text_comes_back_from_json(tmp_path_factory, strings, shape, ascii_only):
    objects = [{"n": 10**5000 if n == 1 else n, "text": text, "x": [None]} for n, text in enumerate(strings)]
    path = tmp_path_factory.mktemp("rows") / (f"a{shape}" if shape[0] == "." else "a.json")
    with int_limit_off():
        if shape in (".jsonl", ".ndjson", ".json"):
            path.write_text("\n".join(json.dumps(o, ensure_ascii=ascii_only) for o in objects), encoding="utf-8")
        else:
            whole = strings if shape == "strings" else objects
            indent = 3 if shape == "pretty" else None
            path.write_text(json.dumps(whole, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    assert rows(path) == kept(strings)


def int_limit_off():
    import contextlib
    import sys

    @contextlib.contextmanager
    def off():
        before = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(0)
        yield
        sys.set_int_max_str_digits(before)

    return off()


def test_an_array_larger_than_the_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("tale_jax.data.text_files.BLOCK_BYTES", 7)
    monkeypatch.setattr("tale_jax.data.text_files.SAMPLE_BYTES", 3)
    wanted = [f'row {n} with "quotes" and ünïcode' * (n % 5 + 1) for n in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(wanted, indent=1, ensure_ascii=False) + "\n \n")
    assert rows(tmp_path / "a.json") == wanted


@given(STRINGS, st.sampled_from([",", "\t", ";", "|"]), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_any_text_comes_back_from_csv(tmp_path_factory, strings, delimiter, line_end, bom):
    import csv
    import io

    table = io.StringIO()
    writer = csv.writer(table, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([["n", "text"], *([n, text] for n, text in enumerate(strings))])
    suffix = ".tsv" if delimiter == "\t" else ".csv"
    path = tmp_path_factory.mktemp("rows") / f"a{suffix}"
    path.write_bytes(table.getvalue().encode("utf-8-sig" if bom else "utf-8"))
    assert rows(path) == kept(strings)


def test_rows_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    wanted = [f"Row {n}" for n in range(600)]
    table = pyarrow.table({"n": range(602), "text": [*wanted, None, " "]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert rows(tmp_path / "a.parquet") == wanted
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert rows(tmp_path / "a.parquet.gz") == wanted


def zst(data):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".zst", zst), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
@pytest.mark.parametrize("kind", [".txt", ".md", ".text", ".jsonl", ".json", ".csv", ".tsv"])
def test_every_kind_is_read_compressed(tmp_path, kind, suffix, compress):
    content = {
        ".jsonl": '{"text": "héllo"}\n',
        ".json": '["héllo"]',
        ".csv": "text\nhéllo\n",
        ".tsv": "a\ttext\n1\théllo",
    }
    path = tmp_path / f"a{kind.upper()}{suffix}"
    path.write_bytes(compress(("\ufeff" + content.get(kind, "héllo")).encode()))
    assert rows(path) == ["héllo"]
    path.write_bytes(path.read_bytes()[:-9])
    says(path, "is damaged or not whole", "download or compress it again")


def test_zst_without_a_library(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(zst(b"text"))
    monkeypatch.setitem(__import__("sys").modules, "compression", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    says(tmp_path / "a.txt.zst", "needs Python 3.14 or pyarrow", "hub", "unzstd")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"text": "ok"}\n' + "[" * 99_999, ["line 2", "sed 2d"]),
        ('{"text": "ok"}\n{"text": ' + "[" * 99_999 + "]" * 99_999 + "}", ["line 2", "sed 2d"]),
        (r'{"text": "\ud800"}', ["line 1", "surrogate"]),
        (r'{"text": "\x"}', ["line 1", "must be a JSON object", "sed 1d"]),
        ('{"text": NaN}', ["line 1", "a number", "name another field"]),
        ('{"text": {"a": 1}}', ["line 1", "an object"]),
        ('{"body": 1, "title": 2}', ["line 1", "body, title", "name one of these"]),
        ('\n\n{"text": "cut', ["line 3", "must be a JSON object"]),
        ("[1]", ["line 1", "not an array"]),
        ("null", ["line 1", "not null"]),
        ("3", ["line 1", "not a number"]),
        ("true", ["line 1", "not true or false"]),
    ],
)
def test_lines_that_are_no_rows(tmp_path, content, parts):
    (tmp_path / "a.jsonl").write_text(content)
    says(tmp_path / "a.jsonl", *parts)


def test_removing_a_bad_line_by_the_given_command_helps(tmp_path):
    import subprocess

    path = tmp_path / "it's [a].jsonl"
    path.write_text('{"text": "one"}\n' + "[" * 99_999 + '\n{"text": "two"}\n')
    message = says(path, "line 2")
    command = message.partition("remove it: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    assert rows(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('["ok", ' + "[" * 99_999, ["row 2"]),
        ('["ok", 3]', ["row 2", "a number"]),
        ('["ok", "cut', ["row 2"]),
        ('["ok"', ["row 2", "must end with ]"]),
        ('["ok" "no comma"]', ["row 2", "comma"]),
        ('["ok",]', ["row 2", "must be JSON"]),
        ('["ok"] more', ["more after it"]),
        (r'["ok", "\udfff"]', ["row 2", "surrogate"]),
        ('[{"text": "ok"}, {"body": "x"}]', ["row 2", "body", "name one of these"]),
        ('{\n  "name": "a program"\n}', ["line 1", "an array of rows"]),
    ],
)
def test_arrays_that_are_no_rows(tmp_path, content, parts):
    (tmp_path / "a.json").write_text(content)
    says(tmp_path / "a.json", *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("n,text\n1,ok\n2,a,b\n", ["line 3", "2 columns", "quotes"]),
        ('n,text\n1,ok\n2,"no end\n3,x\n', ["line 3", "close its quotes"]),
        ('n,text\n1,"a" b\n', ["line 2", "close its quotes"]),
        ("n,body\n1,x\n", ["line 1", "n, body", "name one of these"]),
        ("n;body\n1;x\n", ["n;body"]),
    ],
)
def test_tables_that_are_no_rows(tmp_path, content, parts):
    (tmp_path / "a.csv").write_text(content)
    says(tmp_path / "a.csv", *parts)


def test_a_huge_field_of_a_table(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text('text\n"' + "word " * 60_000 + '"\n')
    assert rows(tmp_path / "a.csv") == ["word " * 60_000]
    monkeypatch.setattr(readers, "MAX_ROW_CHARS", 4_000)
    says(tmp_path / "a.csv", "line 2", "larger than field limit")


def test_parquet_that_cannot_be_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    column = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column, "n": [1, 2]}), path)
    says(path, "row 2", "text cannot be read", "write the file again")
    says(path, "corpus.field=n", "a number", field="n")
    says(path, "corpus.field=body", "text, n", field="body")
    whole = path.read_bytes()
    for size in (4, 20, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:size])
        says(path, "download or write it again")
    path.write_bytes(b"<!DOCTYPE html><html>404</html>")
    says(path, "an HTML page", "download it again")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    says(path, "Git LFS", "git lfs pull")


@pytest.mark.parametrize("places", list(itertools.product(range(0, 900, 90), [0x00, 0xFF])))
def test_parquet_with_a_damaged_byte_is_read_or_one_line(tmp_path, places):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, (place, byte) = tmp_path / "a.parquet", places
    parquet.write_table(pyarrow.table({"text": [f"row {n}" for n in range(99)]}), path)
    data = bytearray(path.read_bytes())
    data[place % len(data)] = byte
    path.write_bytes(data)
    try:
        rows(path)
    except ValueError as error:
        assert "\n" not in str(error) and "a.parquet" in str(error)  # noqa: PT017
