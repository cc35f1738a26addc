"""Documents → batches of tokens with BOS and EOS, on all cores where there is enough text.

    for batch in encode(corpus.documents("train"), tokenizer, corpus.num_bytes("train")):
        file.write(batch.tokens)

The tokens and their order do not depend on the number of cores.
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

from tale_jax.data.tokenizer import Tokenizer, read_tokenizer

BATCH_CHARS = 1 << 20  # minimum length of a batch, but for the last one
MIN_PARALLEL_BYTES = 32 << 20  # one core encodes half of so much text in the second that processes take to start
QUEUED_PER_PROCESS = 2  # batches that wait for each process, so that none is ever idle


class EncodedBatch(NamedTuple):
    """Some documents, each between BOS and EOS, and how many documents, words and bytes of text they are."""

    tokens: bytes  # ids in the tokenizer's dtype
    documents: int
    words: int
    num_bytes: int


def encode(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    num_bytes: int | None,
    words_end_lines: bool = False,
    cores: int = 0,
) -> Iterator[EncodedBatch]:
    """Encodes documents in batches of about `BATCH_CHARS`, a few of which are in memory at once.

    Args:
      documents: read in the caller's process, and no faster than they are encoded.
      tokenizer: the same in every process.
      num_bytes: about how much text there is; None if unknown, which counts as much.
      words_end_lines: see `count_words`.
      cores: processes to encode on; 0: those that this process may use.

    Raises:
      OSError: one line, when a process was killed, for example because memory ran out.
    """
    cores = cores or _usable_cores()
    if cores == 1 or (num_bytes is not None and num_bytes < MIN_PARALLEL_BYTES):
        for texts in _batches(documents):
            yield _encode_batch(tokenizer, texts, words_end_lines)
        return
    # Not forked: JAX may run threads by now, and a fork would copy the locks that they hold.
    context, queue = multiprocessing.get_context("spawn"), collections.deque[Future[EncodedBatch]]()
    with ProcessPoolExecutor(cores, context, _start_worker, (tokenizer.model,)) as pool:
        try:
            for texts in _batches(documents):
                queue.append(pool.submit(_encode_in_worker, texts, words_end_lines))
                while len(queue) > QUEUED_PER_PROCESS * cores or (queue and queue[0].done()):
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        except BrokenProcessPool:
            raise OSError(
                "a process that encodes text was killed, perhaps because memory ran out; run the same command again"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def count_words(text: str, words_end_lines: bool) -> int:
    """Words between white space, the unit of word perplexity; WikiText counts one more for the end of each line."""
    return len(text.split()) + (text.count("\n") if words_end_lines else 0)


def _encode_batch(tokenizer: Tokenizer, texts: list[str], words_end_lines: bool) -> EncodedBatch:
    bos, eos = (np.array([token], tokenizer.dtype).tobytes() for token in (tokenizer.bos_id, tokenizer.eos_id))
    return EncodedBatch(
        b"".join(bos + tokenizer.encode(text).tobytes() + eos for text in texts),
        len(texts),
        sum(count_words(text, words_end_lines) for text in texts),
        sum(len(text.encode()) for text in texts),
    )


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    texts, size = [], 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_tokenizer: Tokenizer  # set in each process of the pool


def _start_worker(model: bytes) -> None:
    """Loads the tokenizer in a process of the pool, which will end when its parent does, even if that is killed."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the pool
    parent = multiprocessing.parent_process()
    assert parent

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _tokenizer = read_tokenizer(model)


def _encode_in_worker(texts: list[str], words_end_lines: bool) -> EncodedBatch:
    return _encode_batch(_tokenizer, texts, words_end_lines)
