"""Text is encoded the same on any number of cores, and no process outlives its parent."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, is_alive

from tale_jax.config import TokenizerConfig
from tale_jax.data import encode as encode_module
from tale_jax.data.encode import count_words, encode
from tale_jax.data.tales.grammar import tell
from tale_jax.data.tokenizer import train_tokenizer

TEXTS = [tell(index, "train", 0).text for index in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, TokenizerConfig(path="", vocab_size=400, sample_bytes=1 << 20))


def test_the_same_in_the_same_order_on_any_number_of_cores(tokenizer, monkeypatch):
    monkeypatch.setattr(encode_module, "BATCH_CHARS", 10_000)
    alone, together = (list(encode(TEXTS, tokenizer, None, True, cores)) for cores in (1, 3))
    assert together == alone
    assert len(alone) > 12
    tokens = np.frombuffer(b"".join(batch.tokens for batch in alone), tokenizer.dtype)
    assert tokenizer.decode(tokens.tolist()) == "".join(TEXTS)
    assert sum(batch.documents for batch in alone) == (tokens == tokenizer.bos_id).sum() == len(TEXTS)
    assert sum(batch.words for batch in alone) == sum(len(text.split()) for text in TEXTS)
    assert sum(batch.num_bytes for batch in alone) == sum(len(text.encode()) for text in TEXTS)


def test_little_text_starts_no_process_and_much_or_unknown_text_does(tokenizer, monkeypatch):
    monkeypatch.setattr(encode_module, "ProcessPoolExecutor", None)
    for num_bytes, cores in ((100_000, 2), (None, 1), (encode_module.MIN_PARALLEL_BYTES, 1)):
        assert sum(batch.documents for batch in encode(TEXTS, tokenizer, num_bytes, cores=cores)) == len(TEXTS)
    for num_bytes in (None, encode_module.MIN_PARALLEL_BYTES):
        with pytest.raises(TypeError):  # None starts nothing
            list(encode(TEXTS, tokenizer, num_bytes, cores=2))


def test_documents_are_read_no_faster_than_they_are_encoded(tokenizer, monkeypatch):
    monkeypatch.setattr(encode_module, "BATCH_CHARS", 1)  # every document is a batch
    for cores, max_ahead in ((1, 1), (2, 1 + 2 * encode_module.QUEUED_PER_PROCESS)):
        read = []
        for done, _ in enumerate(encode((read.append(text) or text for text in TEXTS), tokenizer, None, cores=cores)):
            assert len(read) - done <= max_ahead


@pytest.mark.parametrize(("text", "words", "wikitext_words"), [("", 0, 0), ("a  b\n\nc d\n", 4, 7), ("one", 1, 1)])
def test_wikitext_counts_the_end_of_each_line_as_a_word(text, words, wikitext_words):
    assert (count_words(text, False), count_words(text, True)) == (words, wikitext_words)


def test_text_that_cannot_be_read_ends_the_processes(tokenizer, monkeypatch):
    monkeypatch.setattr(encode_module, "BATCH_CHARS", 10_000)

    def texts():
        yield from TEXTS
        assert children(os.getpid())
        raise ValueError("line 7 must be UTF-8")

    with pytest.raises(ValueError, match="line 7"):
        list(encode(texts(), tokenizer, None, cores=2))
    assert not children(os.getpid())


def test_a_process_that_is_ended_is_told_in_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(encode_module, "BATCH_CHARS", 1_000)

    def texts():
        yield from TEXTS
        for child in children(os.getpid()):
            os.kill(child, signal.SIGKILL)
        yield from TEXTS

    with pytest.raises(OSError, match="was killed") as caught:
        list(encode(texts(), tokenizer, None, cores=2))
    assert "\n" not in str(caught.value)


def test_no_process_outlives_a_killed_caller(tmp_path):
    code = (
        "import itertools, sys; sys.path[:0] = ['.', 'tests', 'tests/data']\n"
        "from test_encode import *\n"
        "if __name__ == '__main__':\n"
        "    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(path='', vocab_size=400, sample_bytes=1 << 20))\n"
        "    for batch in encode(itertools.cycle(TEXTS), tokenizer, None, cores=2):\n"
        "        print('ready', flush=True)\n"
    )
    (tmp_path / "forever.py").write_text(code)
    with subprocess.Popen([sys.executable, tmp_path / "forever.py"], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        started = children(process.pid)
        process.send_signal(signal.SIGKILL)
    assert len(started) >= 2
    deadline = time.monotonic() + 60
    while left := [child for child in started if is_alive(child)]:
        assert time.monotonic() < deadline, f"processes {left} are left"
        time.sleep(0.05)


def children(parent: int) -> list[int]:
    """Of a process: its encoding ones, by what Linux and macOS both have."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [int(pid) for pid, ppid, args in rows if int(ppid) == parent and "spawn_main" in args]
