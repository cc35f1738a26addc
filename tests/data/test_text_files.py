"""Files are found whatever they are called, and decoded or refused by name; every command in a refusal is followed."""

import gzip
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tale_jax.data import text_files
from tale_jax.data.text_files import find_files, fingerprint, lines, one_line, printable, quoted, read_text

WORDS = "The café’s façade was naïve, and the old crow said: go on and on.\n"


def names_in(folder, pattern=None, workdir=None):
    return [str(file.relative_to(folder)) for file in find_files(str(pattern or folder), workdir).files]


def text_of(path, encoding=""):
    return "".join(read_text(path, encoding))


def refusal(path, *parts, encoding=""):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        text_of(path, encoding)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.isprintable()
    for part in (printable(path.name), *parts):
        assert part in message, message
    return message


# Paths.


def test_files_are_found_in_order_and_hidden_ones_are_not(tmp_path):
    names = ("b.txt", "a/z.TXT", "a/deep/y.jsonl", "a0.parquet", "c.md.gz", "d.Text", "e.csv", "f.tsv.zst", "g.ndjson")
    for name in (*names, ".hidden.txt", ".git/x.txt", "a/.cache/x.txt", "a/picture.png", "g.pdf", "h.PNG", "noname"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "e.txt").touch()
    wanted = ["a/deep/y.jsonl", "a/z.TXT", "a0.parquet", "b.txt", "c.md.gz", "d.Text", "e.csv", "f.tsv.zst", "g.ndjson"]
    assert names_in(tmp_path) == wanted
    assert find_files(str(tmp_path)).notes == [
        "5 files were not read: 1 .PNG, 1 .pdf, 1 .png, 1 empty, 1 without a suffix (hidden files are left out)"
    ]
    assert names_in(tmp_path, f"{tmp_path}/**/*.TXT") == ["a/z.TXT"]
    assert names_in(tmp_path, tmp_path / "b.txt") == ["b.txt"]
    assert names_in(tmp_path, f"{tmp_path}/*") == wanted  # folders that a glob names are read whole


def test_json_that_holds_no_rows_is_counted(tmp_path):
    (tmp_path / "package.json").write_text('{\n  "name": "x"\n}\n')
    (tmp_path / "one.json").write_text("3")
    (tmp_path / "rows.json").write_text(' [{"text": "x"}]')
    (tmp_path / "lines.json").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert names_in(tmp_path) == ["lines.json", "rows.json"]
    assert "2 .json without rows" in find_files(str(tmp_path)).notes[0]


def test_links_are_followed_and_circles_are_not(tmp_path):
    (tmp_path / "texts" / "real").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.txt").write_text("x")
    (tmp_path / "beside.txt").write_text("x")
    texts = tmp_path / "texts"
    (texts / "real" / "a.txt").write_text("x")
    (texts / "far").symlink_to(tmp_path / "elsewhere")
    (texts / "again").symlink_to(texts / "real")
    (texts / "real" / "up").symlink_to(texts)
    (texts / "real" / "above").symlink_to(tmp_path)
    (texts / "file.txt").symlink_to(tmp_path / "beside.txt")
    (texts / "lost.txt").symlink_to(tmp_path / "nowhere")
    (texts / "self.txt").symlink_to(texts / "self.txt")
    os.mkfifo(texts / "pipe.txt")
    assert names_in(texts) == ["far/far.txt", "file.txt", "real/a.txt"]
    assert find_files(str(texts)).notes == [
        "3 files were not read: 2 links to nothing, 1 no regular files (hidden files are left out)"
    ]
    (tmp_path / "link").symlink_to(texts)
    assert names_in(tmp_path / "link") == ["far/far.txt", "file.txt", "real/a.txt"]


def make_workdir(folder):
    for name in ("windows", "tokenizer", "checkpoints"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.txt").write_text("x")
    for name in ("config.json", "log.txt", "metrics.jsonl", "samples.jsonl"):
        (folder / name).write_text('{"text": "x"}\n{"text": "x"}\n')


def test_what_runs_wrote_is_left_out_and_that_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    make_workdir(tmp_path / "runs" / "one")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log.txt").write_text("x")
    for pattern in (tmp_path, f"{tmp_path}/*"):
        assert names_in(tmp_path, pattern, workdir=tmp_path / "mine") == ["a.txt"]
        notes = find_files(str(pattern), tmp_path / "mine").notes
        assert [note.partition(" is ")[0] for note in notes] == [str(tmp_path / "mine"), str(tmp_path / "runs" / "one")]
    make_workdir(tmp_path / "texts")
    (tmp_path / "texts" / "book.txt").write_text("x")
    for workdir in (None, tmp_path / "texts"):  # the text lies in a workdir
        assert names_in(tmp_path / "texts", workdir=workdir) == ["book.txt"]


ODD = [
    "[x]",
    "a*b?",
    "two words",
    "new\nline",
    "tab\t",
    "quote'\"$`\\",
    "-n",
    "~",
    "ünï",
    "\udcff\udc80",
    "\x1b[2J",
    "#",
    "%s{}",
]


@pytest.mark.parametrize("name", ODD)
def test_a_path_that_exists_is_taken_literally(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.txt").write_text(WORDS, encoding="utf-8")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x.txt").write_text("what the pattern [x] would find")
    for pattern in (folder, folder / f"{name}.txt"):
        (found,) = find_files(str(pattern)).files
        assert text_of(found) == WORDS
    (folder / f"{name}.txt").write_bytes(WORDS.encode("cp1252"))
    message = refusal(folder / f"{name}.txt", "CP1252", "iconv")
    assert fingerprint([folder / f"{name}.txt"])["files"] == 1
    subprocess.run(["bash", "-c", message.partition("convert it: ")[2]], check=True)
    assert text_of(folder / f"{name}.txt") == WORDS
    assert len(find_files(str(folder)).files) == 1


@settings(max_examples=60)
@example(b"\xc2\x80'\\").via("a control character of two bytes")
@given(st.binary(min_size=1, max_size=40).filter(lambda name: b"/" not in name and b"\0" not in name))
def test_a_name_of_any_bytes(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("odd")
    path = folder / f"a{os.fsdecode(name)}.txt"
    path.write_bytes("naïve café".encode("cp1252"))
    assert find_files(str(path)).files == [path] == find_files(str(folder)).files
    message = refusal(path)
    subprocess.run(["bash", "-c", message.partition("convert it: ")[2]], check=True)
    assert text_of(path) == "naïve café"
    assert printable(path).isprintable() and "\n" not in quoted(path)


def test_paths_that_lead_nowhere(tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "book.doc").write_text("x")
    (tmp_path / "empty.txt").touch()
    for name, parts in {
        "note": ["does not exist", f"did you mean {tmp_path}/notes?"],
        "no*.txt": ["does not exist"],
        "[": ["does not exist"],
        "nul\0": ["NUL"],
        "lost": ["link to nothing"],
        "pipe.txt": ["no regular file"],
        "book.doc": [".txt", f"mv {tmp_path}/book.doc {tmp_path}/book.doc.txt"],
        "empty.txt": ["not empty"],
        "notes": [".txt", "add text"],
        "x" * 5000: ["does not exist"],
    }.items():
        with pytest.raises(ValueError, match=r"corpus\.path=") as caught:
            find_files(f"{tmp_path}/{name}")
        assert all(part in str(caught.value) for part in parts), caught.value
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names_in(tmp_path, "~/book.doc.txt") if (tmp_path / "book.doc.txt").exists() else True
    (tmp_path / "book.doc").rename(tmp_path / "book.doc.txt")  # as it was told
    assert names_in(tmp_path, "~/book.doc.txt") == ["book.doc.txt"]
    monkeypatch.delenv("HOME")
    with pytest.raises(ValueError, match="~ has no meaning here"):
        find_files("~nobody-of-this-name/x")


def test_the_fingerprint_covers_names_sizes_and_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "WHOLE_DIGEST_BYTES", 1000)
    monkeypatch.setattr(text_files, "DIGEST_BLOCK_BYTES", 100)
    (tmp_path / "a.txt").write_bytes(b"x" * 900)
    (tmp_path / "b.txt").write_bytes(b"x" * 90_000)
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    first = fingerprint(files)
    assert (first["files"], first["bytes"]) == (2, 90_900)
    for path, place in ((files[0], 450), (files[1], 0), (files[1], 89_999)):
        data = bytearray(path.read_bytes())
        data[place] += 1
        path.write_bytes(data)
        changed = fingerprint(files)
        assert changed["names_and_sizes"] == first["names_and_sizes"]
        assert changed["contents"] != first["contents"]
        data[place] -= 1
        path.write_bytes(data)
        assert fingerprint(files) == first
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert fingerprint([tmp_path / "copy" / file.name for file in files]) == first
    files[0].rename(tmp_path / "c.txt")
    assert fingerprint([files[1], tmp_path / "c.txt"])["contents"] != first["contents"]
    assert fingerprint([]) == {}


# Bytes to text.

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "\0" not in text)


@given(ANY_TEXT, st.integers(1, 50), st.booleans())
def test_utf8_comes_back_whatever_the_blocks(tmp_path_factory, text, block, bom):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "BLOCK_BYTES", block)
        patch.setattr(text_files, "SAMPLE_BYTES", 4096)
        try:
            assert text_of(path) == text.lstrip("\ufeff")
        except ValueError as error:
            assert "HTML" in str(error) or "is a" in str(error) or "compressed" in str(error)  # noqa: PT017


@given(ANY_TEXT.filter(str.strip), st.sampled_from(["utf-16", "utf-32", "utf-16-le", "utf-32-be", "gb18030", "utf-7"]))
def test_a_named_encoding_is_read(tmp_path_factory, text, encoding):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    data = ("words first. " + text).encode(encoding)
    path.write_bytes(data)
    assert text_of(path, encoding) == "words first. " + text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("order", ["-le", "-be"])
@pytest.mark.parametrize("bom", [True, False])
def test_wide_text_is_refused_by_name_and_both_remedies_work(tmp_path, encoding, order, bom):
    path = tmp_path / "book.txt"
    path.write_bytes((("\ufeff" if bom else "") + WORDS * 50).encode(encoding + order))
    wanted = encoding if bom else encoding + order
    message = refusal(path, wanted.upper(), f"--config.corpus.encoding={wanted},")
    assert text_of(path, wanted) == WORDS * 50
    assert text_of(path, encoding) == WORDS * 50
    subprocess.run(["bash", "-c", message.partition("convert it: ")[2]], check=True)
    assert text_of(path) == WORDS * 50
    assert text_of(path, encoding) == WORDS * 50  # a mixed folder: what is UTF-8 by now is read as that


@pytest.mark.parametrize("encoding", ["cp1252", "cp850", "mac-roman"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_code_page_is_named_and_both_remedies_work(tmp_path, encoding, suffix):
    path, data = tmp_path / f"my book.txt{suffix}", (WORDS.replace("’", "é") * 3000).encode(encoding)
    path.write_bytes(gzip.compress(data, mtime=0) if suffix else data)
    message = refusal(path, "byte 0x", "at offset 7", f"--config.corpus.encoding={encoding},")
    assert text_of(path, encoding).encode(encoding) == data
    subprocess.run(["bash", "-c", message.partition("convert it: ")[2]], check=True)
    assert text_of(tmp_path / "my book.txt").encode(encoding) == data
    assert len(find_files(str(tmp_path)).files) == 1


def test_an_encoding_is_for_the_files_that_are_not_utf8(tmp_path):
    for name, data in {
        "code page.txt": WORDS.encode("cp1252"),
        "utf-8.txt": WORDS.encode(),
        "bom.txt": WORDS.encode("utf-8-sig"),
        "wide.txt": WORDS.encode("utf-16"),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert text_of(tmp_path / name, "cp1252") == WORDS
    (tmp_path / "wrong.txt").write_bytes("日本".encode("shift_jis") + b"\x81")
    refusal(tmp_path / "wrong.txt", "must be ascii, as corpus.encoding says", "byte 0x93 at offset 0", encoding="ascii")
    (tmp_path / "wide.txt").write_bytes(WORDS.encode("utf-16-le"))
    refusal(tmp_path / "wide.txt", "is not cp437", "NUL", encoding="cp437")
    (tmp_path / "half.txt").write_bytes(b"+2AA-x")  # a lone surrogate in UTF-7
    refusal(tmp_path / "half.txt", "utf-7", encoding="utf-7")


def test_bytes_that_belong_to_no_encoding(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("né ".encode() * 9 + b"\xe9 alone")
    message = refusal(path, "must be UTF-8, but byte 0xe9 at offset 36", "leave such bytes out")
    subprocess.run(["bash", "-c", message.partition("leave such bytes out: ")[2]], check=False)
    assert text_of(path) == "né " * 9 + " alone"
    path.write_bytes(b"text\n" * 30_000 + b"stray \0 byte")
    message = refusal(path, "NUL at offset 150006")
    subprocess.run(["bash", "-c", message.partition("leave such bytes out: ")[2]], check=True)
    assert text_of(path) == "text\n" * 30_000 + "stray  byte"
    path.write_bytes(bytes(range(256)) * 20)
    refusal(path, "is binary", "remove it")
    path.write_bytes(b"\x01\x02\x03\x04\x81\x8d\xff" * 200)
    refusal(path, "is binary", "remove it")


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (gzip.compress(b"text", mtime=0), ["compressed with gzip", "mv"]),
        (b"%PDF-1.4", ["a PDF", "pdftotext"]),
        (b"\x89PNG\r\n\x1a\n", ["a PNG picture", "remove it"]),
        (b"PK\x03\x04zip", ["a zip archive", "unzip"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS", "git lfs pull"]),
        (b"<!DOCTYPE html>\n<title>404</title>", ["HTML", "download it again", "put a line of text before it"]),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, data, parts):
    for name in ("a.txt", "a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(data)
        refusal(tmp_path / name, *parts)
        refusal(tmp_path / name, *parts, encoding="cp1252")
    if b"html" in data:
        (tmp_path / "a.txt").write_bytes(b"A page:\n" + data)
        assert text_of(tmp_path / "a.txt").startswith("A page:\n<!DOCTYPE")


def test_a_compressed_file_takes_the_name_it_is_told(tmp_path):
    (tmp_path / "a b.txt").write_bytes(gzip.compress(b"text", mtime=0))
    message = refusal(tmp_path / "a b.txt")
    subprocess.run(["bash", "-c", message.partition("what it is: ")[2]], check=True)
    assert text_of(tmp_path / "a b.txt.gz") == "text"
    (tmp_path / "c.md.gz").write_bytes(b"plain text")
    message = refusal(tmp_path / "c.md.gz", "is not compressed with gzip")
    subprocess.run(["bash", "-c", message.partition("says; ")[2]], check=True)
    assert text_of(tmp_path / "c.md") == "plain text"
    (tmp_path / "d.txt.xz").write_bytes(gzip.compress(b"text", mtime=0))
    refusal(tmp_path / "d.txt.xz", "is compressed with gzip, not compressed with xz")


def test_a_mark_is_dropped_only_where_a_file_starts(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\xef\xbb\xbfone\xef\xbb\xbftwo")
    assert text_of(tmp_path / "a.txt") == "one\ufefftwo"


@given(st.lists(st.text("ab\n\r\u2028", max_size=5)), st.integers(1, 9))
def test_lines_join_to_the_text(blocks, limit):
    found = list(lines(blocks))
    assert "".join(found) == "".join(blocks)
    assert all(line.endswith("\n") for line in found[:-1]) and all("\n" not in line[:-1] for line in found)
    assert "".join(lines(blocks, limit)) == "".join(blocks)


def test_an_error_of_another_library_is_one_line():
    assert one_line(ValueError("  first\nsecond")) == "first"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 9999))) == 200


def test_unreadable_files_are_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        text_of(Path(tmp_path / "gone.txt"))
