"""Text is encoded the same on any number of cores, and no process outlives what it was begun for."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT

from tale_jax.config import TokenizerConfig
from tale_jax.data.encode import encode
from tale_jax.data.tales import grammar as tales
from tale_jax.data.tokenizer import train_tokenizer

TEXTS = [tales.tell(index, "train", 0).text for index in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, TokenizerConfig(path="", vocab_size=400, sample_bytes=1 << 20))


def test_the_same_in_the_same_order_on_any_number_of_cores(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 10_000)
    alone, together = (list(encode(TEXTS, tokenizer, None, True, cores)) for cores in (1, 3))
    assert together == alone
    assert len(alone) > 12
    tokens = np.frombuffer(b"".join(run.tokens for run in alone), tokenizer.dtype)
    assert tokenizer.decode(tokens.tolist()) == "".join(TEXTS)
    assert sum(run.documents for run in alone) == (tokens == tokenizer.bos_id).sum() == len(TEXTS)
    assert sum(run.words for run in alone) == sum(len(text.split()) for text in TEXTS)


def test_little_text_begins_no_process(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "ProcessPoolExecutor", None)
    assert sum(run.documents for run in encode(TEXTS, tokenizer, 100_000, cores=2)) == len(TEXTS)


def test_text_that_cannot_be_read_ends_the_processes(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 10_000)

    def texts():
        yield from TEXTS
        assert children(os.getpid())
        raise ValueError("line 7 must be UTF-8")

    with pytest.raises(ValueError, match="line 7"):
        list(encode(texts(), tokenizer, None, cores=2))
    assert not children(os.getpid())


def test_a_process_that_is_ended_is_told_in_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 1_000)

    def texts():
        yield from TEXTS
        for child in children(os.getpid()):
            os.kill(child, signal.SIGKILL)
        yield from TEXTS

    with pytest.raises(OSError, match="ended from outside") as caught:
        list(encode(texts(), tokenizer, None, cores=2))
    assert "\n" not in str(caught.value)


def test_no_process_outlives_a_killed_caller(tmp_path):
    code = (
        "import itertools, sys; sys.path[:0] = ['.', 'tests']\n"
        "from test_encode import *\n"
        "if __name__ == '__main__':\n"
        "    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(path='', vocab_size=400, sample_bytes=1 << 20))\n"
        "    for run in encode(itertools.cycle(TEXTS), tokenizer, None, cores=2):\n"
        "        print('ready', flush=True)\n"
    )
    (tmp_path / "forever.py").write_text(code)
    with subprocess.Popen([sys.executable, tmp_path / "forever.py"], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        begun = children(process.pid)
        process.send_signal(signal.SIGKILL)
    assert len(begun) >= 2
    deadline = time.monotonic() + 10
    while left := [child for child in begun if is_alive(child)]:
        assert time.monotonic() < deadline, f"processes {left} are left"
        time.sleep(0.05)


def children(parent: int) -> list[int]:
    """Of a process: its encoding ones, by what Linux and macOS both have."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [int(pid) for pid, ppid, args in rows if int(ppid) == parent and "spawn_main" in args]


def is_alive(pid: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(listed) and not listed.startswith("Z")
