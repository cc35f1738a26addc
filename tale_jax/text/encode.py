"""Documents -> runs of tokens with the marks of their ends; on all cores where there is text enough to pay for it.

    for run in encode(corpus.documents("train"), tokenizer, corpus.num_bytes("train")):
        file.write(run.tokens)

The result is the same, and in the same order, however many cores there are.
"""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from tale_jax.text.tokenizer import Tokenizer

RUN_BYTES = 1 << 20  # of text encoded at once, at least
PARALLEL_FROM = 32 << 20  # bytes of text: half of them are encoded in the second that processes take to start
AHEAD = 2  # runs that wait for each process, so that none is ever idle


class Run(NamedTuple):
    """Some documents, one after another, each between BOS and EOS; and what they hold besides those marks."""

    tokens: bytes  # of the tokenizer's dtype
    documents: int
    words: int
    num_bytes: int


def encode(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    num_bytes: int | None,
    words_end_lines: bool = False,
    cores: int = 0,
) -> Iterator[Run]:
    """Encodes documents in runs of about `RUN_BYTES`, holding a few of them at once.

    Args:
      documents: read in the caller's process, and no faster than they are encoded.
      tokenizer: the same in every process.
      num_bytes: about how much text there is; None: unknown, and taken to be much.
      words_end_lines: see `count_words`.
      cores: processes to encode on; 0: those that this process may use.

    Raises:
      OSError: one line, when a process was ended from outside, as for want of memory.
    """
    cores = cores or _usable_cores()
    if cores == 1 or (num_bytes is not None and num_bytes < PARALLEL_FROM):
        for texts in _runs(documents):
            yield _encode_run(tokenizer, texts, words_end_lines)
        return
    # Not forked: JAX may run threads by now, and a fork would copy the locks that they hold.
    context, waiting = multiprocessing.get_context("spawn"), collections.deque[Future[Run]]()
    with ProcessPoolExecutor(cores, context, _begin, (tokenizer.model,)) as pool:
        try:
            for texts in _runs(documents):
                waiting.append(pool.submit(_encode, texts, words_end_lines))
                while len(waiting) > AHEAD * cores or (waiting and waiting[0].done()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise OSError(
                "a process that encodes text was ended from outside, as for want of memory; run the same command again"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def count_words(text: str, words_end_lines: bool) -> int:
    """Words between white space, the unit of word perplexity; WikiText counts one more for the end of each line."""
    return len(text.split()) + (text.count("\n") if words_end_lines else 0)


def _encode_run(tokenizer: Tokenizer, texts: list[str], words_end_lines: bool) -> Run:
    bos, eos = (np.array([mark], tokenizer.dtype).tobytes() for mark in (tokenizer.bos_id, tokenizer.eos_id))
    return Run(
        b"".join(bos + tokenizer.encode(text).tobytes() + eos for text in texts),
        len(texts),
        sum(count_words(text, words_end_lines) for text in texts),
        sum(len(text.encode()) for text in texts),
    )


def _runs(documents: Iterable[str]) -> Iterator[list[str]]:
    texts, size = [], 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= RUN_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_tokenizer: Tokenizer  # of a process of the pool


def _begin(model: bytes) -> None:
    """Makes a process of the pool ready, and sees that it ends with the one that began it, were that killed."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who then ends the pool
    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _tokenizer = Tokenizer(model)


def _encode(texts: list[str], words_end_lines: bool) -> Run:
    return _encode_run(_tokenizer, texts, words_end_lines)
