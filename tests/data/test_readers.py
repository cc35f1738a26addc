"""Files become documents that, joined, are the files; how they are read in blocks never shows."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tale_jax.data import readers


@given(
    st.lists(
        st.sampled_from([b"a word ", b"\n", b"\n \n", b"\n\n\n", "né".encode(), b"\r\n\r\n", b"x" * 90]), max_size=60
    ),
    st.integers(5, 80),
    st.integers(1, 300),
)
def test_passages_join_to_the_file_and_do_not_depend_on_the_blocks(parts, target, block):
    data = b"".join(parts)

    class Slow(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(block, size))

    passages = list(readers.split_passages(io.BytesIO(data), target))
    assert passages == list(readers.split_passages(Slow(data), target))
    assert b"".join(passages) == data
    for passage in passages:
        passage.decode()
        assert 0 < len(passage) <= 4 * target


@pytest.mark.parametrize(
    ("text", "passages"),
    [
        ("aaaa bbbb\n\ncccc dddd", ["aaaa bbbb\n\n", "cccc dddd"]),  # at a blank line
        ("aaaa\n\nbbbb cccc dd\n \n\nee", ["aaaa\n\nbbbb cccc dd\n \n\n", "ee"]),  # the first after 8 bytes
        ("a" * 20 + "\n" + "b" * 20, ["a" * 20 + "\n", "b" * 20]),  # at the last line end before 32 bytes
        ("a" * 20 + " " + "b" * 20, ["a" * 20 + " ", "b" * 20]),  # at the last space
        ("a" * 40, ["a" * 32, "a" * 8]),  # anywhere
        ("a" * 31 + "é" * 4, ["a" * 31, "é" * 4]),  # but not inside a character
    ],
)
def test_passages_end_where_a_reader_would_pause(text, passages):
    assert [passage.decode() for passage in readers.split_passages(io.BytesIO(text.encode()), 8)] == passages


@pytest.mark.parametrize(
    ("size", "target"), [(32_000, 32_000), (32_001, 2_000), (128 * 5_000, 5_000), (128 * 20_000, 16_000)]
)
def test_a_long_file_becomes_about_128_passages_of_a_useful_size(tmp_path, size, target):
    (tmp_path / "book.txt").write_bytes(b"word\n\n" * (size // 6) + b"." * (size % 6))
    passages = list(readers.read_file(tmp_path / "book.txt", "text"))
    assert sum(map(len, passages)) == size
    assert all(target <= len(passage) <= target + 6 for passage in passages[:-1])


def test_files_are_found_in_order_and_hidden_ones_are_not(tmp_path):
    names = ("b.txt", "a/z.TXT", "a/deep/y.jsonl", "a0.parquet")
    for name in (*names, ".hidden.txt", ".git/x.txt", "a/.cache/x.txt", "a/picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [str(path.relative_to(tmp_path)) for path in readers.find_files(str(tmp_path))]
    assert found == ["a/deep/y.jsonl", "a/z.TXT", "a0.parquet", "b.txt"]
    assert [path.name for path in readers.find_files(f"{tmp_path}/**/*.TXT")] == ["z.TXT"]
    assert [path.name for path in readers.find_files(str(tmp_path / "b.txt"))] == ["b.txt"]


@pytest.mark.parametrize("block", [1, 7, 16, 1 << 20])
def test_stories_do_not_depend_on_the_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    text = "\n One é.\n<|endoftext|><|endoftext|> \n<|endoftext|>Two < and more.\nThe end"
    (tmp_path / "stories.txt").write_text(text)
    assert list(readers.stories(tmp_path / "stories.txt")) == ["One é.", "Two < and more.\nThe end"]


def test_lines_keep_their_ends(tmp_path):
    (tmp_path / "file").write_bytes(b"one\r\n\n two")
    assert list(readers.lines(tmp_path / "file")) == ["one\r\n", "\n", " two"]


def test_an_error_of_another_library_is_one_line():
    assert readers.one_line(ValueError("  first\nsecond")) == "first"
    assert readers.one_line(KeyError()) == "KeyError"
