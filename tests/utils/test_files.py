"""Files are whole or not there, whatever happens while they are written; logs survive a torn line."""

import json
import os
import stat

import numpy as np
import pytest

from tale_jax.utils.files import JsonLines, atomic_writer, read_json_lines, to_json, write_atomically


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_an_error_half_way_keeps_the_old_content_and_leaves_nothing_behind(tmp_path, error):
    path = tmp_path / "config.json"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_writer(path) as file:
        file.write(b"new, but only ha")
        file.flush()
        assert path.read_text() == "old"  # until the new one is whole
        raise error
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"config.json": "old"}


def test_an_error_before_the_first_version_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="stop"), atomic_writer(tmp_path / "new") as file:
        file.write(b"x")
        raise ValueError("stop")
    assert not list(tmp_path.iterdir())


def test_content_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, synced, fsync = tmp_path / "file", [], os.fsync

    def record(handle):
        synced.append((os.fstat(handle).st_mode, path.exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    write_atomically(path, b"content")
    (content, named), (folder, renamed) = synced
    assert stat.S_ISREG(content) and not named
    assert stat.S_ISDIR(folder) and renamed


def test_content_is_replaced_as_text_or_bytes_with_the_mode_of_a_usual_file(tmp_path):
    path, usual = tmp_path / "file", tmp_path / "usual"
    usual.touch()
    for content, expected in (("é\n", "é\n".encode()), (b"\xff\0", b"\xff\0"), ("", b"")):
        write_atomically(path, content)
        assert path.read_bytes() == expected
    assert path.stat().st_mode == usual.stat().st_mode
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ("", []),
        ('{"a": 1}\n', [{"a": 1}]),
        ('{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),  # whole, but for its newline
        ('{"a": 1}\n{"a": 2, "b', [{"a": 1}]),
        ('{"a', []),
    ],
)
def test_a_torn_line_is_mended_before_the_next_record(tmp_path, before, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text(before)
    JsonLines(path).append({"a": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*kept, {"a": 3}]
    assert path.read_text().endswith("\n")


def test_records_are_in_the_file_as_they_come_in_a_folder_that_is_made(tmp_path):
    lines = JsonLines(tmp_path / "new" / "samples.jsonl")
    for step in range(3):
        lines.append({"step": step, "text": "é\n"})
        assert len(read_json_lines(tmp_path / "new" / "samples.jsonl")) == step + 1


def test_reading_skips_what_is_no_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    path.write_bytes(b'{"a": 1}\n[2]\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"a": 3}\n{"a"')
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}]


def test_numbers_that_json_lacks_become_its_own():
    record = {"loss": np.float32(1.5), "step": np.int64(3), "nan": float("nan"), "inf": np.float64("inf"), "text": "x"}
    plain = to_json(record)
    assert plain == {"loss": 1.5, "step": 3, "nan": None, "inf": None, "text": "x"}
    assert json.dumps(plain, allow_nan=False)
