"""One writer at a time, and none that a dead one keeps out."""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

from tale_jax.utils.locks import LOCK_FILE, writer_lock

HOLD = """
import sys, time
from pathlib import Path
from tale_jax.utils.locks import writer_lock
with writer_lock(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def take(folder):
    with writer_lock(folder, "prepare"):
        return json.loads((folder / LOCK_FILE).read_text())


def test_a_second_writer_is_refused_in_one_line_that_names_the_first(tmp_path, holder):
    with pytest.raises(ValueError, match=rf"in use by train \(process {holder.pid} on .*kill {holder.pid}") as caught:
        take(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert take(tmp_path)["process"] == os.getpid()


def test_a_lock_that_was_given_back_is_free_and_a_failure_gives_it_back(tmp_path):
    assert take(tmp_path)["task"] == "prepare"
    with pytest.raises(RuntimeError), writer_lock(tmp_path, "train"):
        raise RuntimeError
    take(tmp_path)


def tree(folder):
    return sorted(
        (path.relative_to(folder).as_posix(), path.is_dir() or path.read_bytes()) for path in folder.rglob("*")
    )


@pytest.mark.parametrize("there", [(), ("run/",), ("run/mine.txt", "run/windows/train.bin")])
def test_what_fails_leaves_no_trace_unless_it_made_something_of_worth(tmp_path, there):
    for name in there:
        path = tmp_path / name
        path.mkdir(parents=True) if name.endswith("/") else path.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text("of the user")
    before, folder = tree(tmp_path), tmp_path / "run"

    def fail(*made, wrong=ValueError):
        with pytest.raises(wrong), writer_lock(folder, "train", lambda folder: sorted(folder.glob("*.json"))):
            with writer_lock(folder, "prepare", lambda folder: []):  # inside the other
                (folder / "checkpoints").mkdir()
                (folder / "log.txt").write_text("refused")
            for name in made:
                (folder / name).touch()
            raise wrong

    fail()
    fail(wrong=KeyboardInterrupt)
    assert tree(tmp_path) == before
    fail("config.json")
    assert {"log.txt", "config.json", "checkpoints", LOCK_FILE} <= set(os.listdir(folder))


def test_a_folder_with_parents_goes_as_far_as_it_was_made(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyError), writer_lock(tmp_path / "a" / "b" / "c", "train", lambda folder: []):
        raise KeyError
    assert os.listdir(tmp_path) == ["a"] and not os.listdir(tmp_path / "a")


def test_who_is_refused_by_the_lock_removes_nothing(tmp_path, holder):
    (tmp_path / "log.txt").write_text("of the holder")
    with pytest.raises(ValueError, match="in use"), writer_lock(tmp_path, "train", lambda folder: []):
        pass
    assert {"log.txt", LOCK_FILE} == set(os.listdir(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[" * 5000, b'{"process": null}', b'{"start_time": 1e400}'])
def test_whatever_stands_in_the_file_the_refusal_is_one_line(tmp_path, holder, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"workdir={tmp_path} is in use"):
        take(tmp_path)
