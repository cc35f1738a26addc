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

from tale_jax.data.chat import ChatCounts, answers, encode_conversation
from tale_jax.data.chat_template import ChatTemplate
from tale_jax.data.marks import DTYPE, FIRST, LEARNED, MARKED, is_learned
from tale_jax.data.tokenizer import Tokenizer, read_tokenizer

BATCH_CHARS = 1 << 20  # minimum length of a batch, but for the last one
MIN_PARALLEL_BYTES = 32 << 20  # one core encodes half of so much text in the second that processes take to start
QUEUED_PER_PROCESS = 2  # batches that wait for each process, so that none is ever idle


class EncodedBatch(NamedTuple):
    """Some documents, each between BOS and EOS, and how many documents, words and bytes of text they are.

    Of conversations words and bytes are those of the assistant, and a document is a sequence of tokens.
    """

    tokens: bytes  # of `stream_dtype`
    documents: int
    words: int
    num_bytes: int
    chat: ChatCounts = ChatCounts()
    read_bytes: int = 0  # of conversations as they are stored


class Chats(NamedTuple):
    """How documents that are conversations are encoded: by which template, and the length that windows have."""

    template: str
    window_len: int


def stream_dtype(tokenizer: Tokenizer, chats: Chats | None = None) -> np.dtype:
    """Of the tokens on disk: with marks (see `marks.py`) where the ids alone do not tell what is what."""
    return DTYPE if chats or tokenizer.bos_id == tokenizer.eos_id else tokenizer.dtype


def encode(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    num_bytes: int | None,
    words_end_lines: bool = False,
    cores: int = 0,
    chats: Chats | None = None,
) -> Iterator[EncodedBatch]:
    """Encodes documents in batches of about `BATCH_CHARS`, a few of which are in memory at once.

    Args:
      documents: read in the caller's process, and no faster than they are encoded.
      tokenizer: the same in every process.
      num_bytes: about how much text there is; None if unknown, which counts as much.
      words_end_lines: see `count_words`.
      cores: processes to encode on; 0: those that this process may use.
      chats: documents are conversations.

    Raises:
      ValueError: one line, for a conversation that the template refuses.
      OSError: one line, when a process was killed, for example because memory ran out.
    """
    cores = cores or _usable_cores()
    if cores == 1 or (num_bytes is not None and num_bytes < MIN_PARALLEL_BYTES):
        for texts in _batches(documents):
            yield _encode_batch(tokenizer, texts, words_end_lines, chats)
        return
    # Not forked: JAX may run threads by now, and a fork would copy the locks that they hold.
    context, queue = multiprocessing.get_context("spawn"), collections.deque[Future[EncodedBatch]]()
    with ProcessPoolExecutor(cores, context, _start_worker, (tokenizer.model, chats)) as pool:
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


def _encode_batch(
    tokenizer: Tokenizer, texts: list[str], words_end_lines: bool, chats: Chats | None = None
) -> EncodedBatch:
    if chats:
        return _encode_chats(tokenizer, texts, chats)
    if stream_dtype(tokenizer).itemsize == DTYPE.itemsize:
        return _encode_with_marks(tokenizer, texts, words_end_lines)
    bos, eos = (np.array([token], tokenizer.dtype).tobytes() for token in (tokenizer.bos_id, tokenizer.eos_id))
    return EncodedBatch(
        b"".join(bos + tokenizer.encode(text).tobytes() + eos for text in texts),
        len(texts),
        sum(count_words(text, words_end_lines) for text in texts),
        sum(len(text.encode()) for text in texts),
    )


def _encode_with_marks(tokenizer: Tokenizer, texts: list[str], words_end_lines: bool) -> EncodedBatch:
    parts = []
    for text in texts:
        tokens = np.concatenate([tokenizer.encode(text).astype(DTYPE), np.array([tokenizer.eos_id], DTYPE)])
        parts += [np.array([tokenizer.bos_id | FIRST], DTYPE).tobytes(), (tokens | LEARNED).astype(DTYPE).tobytes()]
    words = sum(count_words(text, words_end_lines) for text in texts)
    return EncodedBatch(b"".join(parts), len(texts), words, sum(len(text.encode()) for text in texts))


def _encode_chats(tokenizer: Tokenizer, texts: list[str], chats: Chats) -> EncodedBatch:
    template = ChatTemplate(tokenizer, chats.template)
    sequences = [tokens for text in texts for tokens in encode_conversation(template, text)]
    said = [answers(text) for text in texts]
    counts = ChatCounts(
        len(texts),
        sum(int(is_learned(tokens, MARKED).sum()) for tokens in sequences),
        sum(len(tokens) > chats.window_len + 1 for tokens in sequences),
    )
    return EncodedBatch(
        b"".join(tokens.tobytes() for tokens in sequences),
        len(sequences),
        sum(count_words(text, False) for text in said),
        sum(len(text.encode()) for text in said),
        counts,
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


_tokenizer: Tokenizer  # set in each process of the pool, as
_chats: Chats | None


def _start_worker(model: bytes, chats: Chats | None) -> None:
    """Loads the tokenizer in a process of the pool, which will end when its parent does, even if that is killed."""
    global _tokenizer, _chats
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the pool
    parent = multiprocessing.parent_process()
    assert parent

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _tokenizer, _chats = read_tokenizer(model), chats


def _encode_in_worker(texts: list[str], words_end_lines: bool) -> EncodedBatch:
    return _encode_batch(_tokenizer, texts, words_end_lines, _chats)
