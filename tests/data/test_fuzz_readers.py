"""Files of any content under any suffix are read, or refused in one line: no other exception, and no line that is long.

`pytest -m slow tests/data/test_fuzz_readers.py` makes 20,000 files; the quick suite makes 300.
"""

import csv
import gzip
import io
import json
import lzma

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tale_jax.data.readers import Cut, read_documents
from tale_jax.data.text_files import find_files

KINDS = (".txt", ".md", ".text", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
PACKED = ("", "", "", ".gz", ".zst", ".bz2", ".xz")
ENCODINGS = (
    "",
    "",
    "",
    "utf-16",
    "utf-32-be",
    "cp1252",
    "shift_jis",
    "gb18030",
    "utf-7",
    "raw_unicode_escape",
    "ascii",
    "idna",
)

TEXT = st.text(max_size=200)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", ""]), inner, max_size=3),
    max_leaves=12,
)
ROW = st.fixed_dictionaries({"text": st.text(max_size=40) | VALUE}) | VALUE
HEADS = (
    b"\xff\xfe",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe\0\0",
    b"PAR1",
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
    b"PK\x03\x04",
    b"%PDF-",
    b"<!doctype html>",
    b"version https://git-lfs.github.com/spec/v1",
    b"text\n",
    b"a,text\n",
    b"[",
    b'{"text": "',
)


def json_bytes(value):
    return json.dumps(value).encode()


def table(rows):
    out = io.StringIO()
    csv.writer(out).writerows([["n", "text"], *enumerate(rows)])
    return out.getvalue().encode("utf-8", "surrogatepass")


def parquet_bytes(rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    out = io.BytesIO()
    column = pyarrow.array([row.encode("utf-8", "surrogatepass") for row in rows], pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": column.view(pyarrow.string())}), out)
    return out.getvalue()


CONTENT = st.one_of(
    st.binary(max_size=400),
    st.builds(lambda head, rest: head + rest, st.sampled_from(HEADS), st.binary(max_size=200)),
    st.builds(
        lambda text, encoding: text.encode(encoding, "replace"),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
        st.sampled_from(
            ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252", "koi8-r", "shift_jis", "cp037"]
        ),
    ),
    st.lists(ROW, max_size=5).map(lambda rows: b"\n".join(map(json_bytes, rows))),
    st.lists(ROW, max_size=5).map(json_bytes),
    st.lists(TEXT, max_size=5).map(table),
    st.lists(TEXT, max_size=5).map(parquet_bytes),
    st.integers(1, 50_000).map(lambda depth: b'{"text": ' + b"[" * depth),
    st.integers(1, 9_000).map(lambda digits: b'{"text": "x", "n": ' + b"9" * digits + b"}"),
    st.integers(1, 9_000).map(lambda size: b'n,text\n1,"' + b'x"",' * size),
)
PACK = {
    ".gz": gzip.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".bz2": lambda data: __import__("bz2").compress(data),
    ".zst": lambda data: pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True),
}


@st.composite
def files(draw):
    """Name, content and encoding of a file; the content may be compressed, then damaged, or neither."""
    kind, packed, content = draw(st.sampled_from(KINDS)), draw(st.sampled_from(PACKED)), draw(CONTENT)
    if packed and draw(st.integers(0, 4)):
        content = PACK[packed](content)
    damage = draw(st.integers(0, 5))
    if content and damage == 0:
        content = content[: draw(st.integers(0, len(content)))]
    if content and damage == 1:
        place, byte = draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 255))
        content = content[:place] + bytes([byte]) + content[place + 1 :]
    return f"a{kind}{packed}", content, draw(st.sampled_from(ENCODINGS))


def check(folder, name, content, encoding):
    """Reads one file as a corpus does."""
    path = folder / name
    path.write_bytes(content)
    try:
        for pattern in (folder, path):
            found = find_files(str(pattern)).files
            for document in read_documents(found, "text", encoding, Cut(64, 16)):
                assert document.text.strip() and document.text.encode()
    except (ValueError, OSError) as error:
        message = str(error)
        assert type(error) in (ValueError, OSError), repr(error)  # noqa: PT017 # not UnicodeError, say, which it covers
        assert message.isprintable() and str(folder) in message and len(message) < 1500, message
    finally:
        path.unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=300, **QUIET)
@given(files())
@example(("a.txt", b"\xff\xfe\x00\xd8", "utf-16"))
@example(("a.json", b"[" * 50_000, ""))
@example(("a.csv", b"\0", ""))
def test_any_file_is_read_or_refused_in_one_line(folder, file):
    check(folder, *file)


@pytest.mark.slow
@settings(max_examples=20_000, **QUIET)
@given(files())
def test_twenty_thousand_files(folder, file):
    check(folder, *file)
