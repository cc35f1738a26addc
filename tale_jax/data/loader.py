"""Token windows → batches: shuffled anew in every pass, shared among processes, prefetched, resumable to the batch.

The stream of prepared tokens is split into windows that follow one another, or so that each document starts a window. A
pass takes each window once, in an order that depends on seed and pass; the next pass follows without a gap. Which
windows make up batch n, and in which rows, does not depend on how many processes there are: each takes a block of the
rows. Hence the state is one integer, the same on every process, and a run may be resumed by another number of them.

    batches = Batches(tokens, window_starts(tokens, 256), seq_len=256, batch_size=8, seed=0)
    batch = next(batches)                 # int32 [8, 257]: inputs batch[:, :-1], targets batch[:, 1:]
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32, Integer

from tale_jax.data.token_files import document_starts


def window_starts(
    tokens: Integer[np.ndarray, " N"], seq_len: int, bos_id: int | None = None
) -> Integer[np.ndarray, " windows"]:
    """The position in the stream of each window's first token; a window is `seq_len` inputs and one more target.

    With `bos_id` every document starts a window (and goes on in further ones where it is longer); the rest of the
    window is the start of the next document. Each token then sees all of its document before it, up to `seq_len`.
    """
    last = len(tokens) - seq_len - 1
    if bos_id is None:
        return np.arange(0, last + 1, seq_len)
    documents = document_starts(tokens, bos_id)
    lengths = np.diff(documents, append=len(tokens))
    num_windows = np.maximum(1, -(-(lengths - 1) // seq_len))  # of each document; rounded up
    index_in_document = np.arange(num_windows.sum()) - np.repeat(np.cumsum(num_windows) - num_windows, num_windows)
    starts = np.repeat(documents, num_windows) + seq_len * index_in_document
    return starts[starts <= last]


def split_windows(windows: Int32[np.ndarray, "B T1"], divisor: int) -> Int32[np.ndarray, "more shorter"]:
    """Each window as `divisor` shorter ones, with the same inputs and targets; `divisor` must divide T."""
    if divisor == 1:
        return windows
    inputs, targets = (x.reshape(-1, (windows.shape[1] - 1) // divisor) for x in (windows[:, :-1], windows[:, 1:]))
    return np.concatenate([inputs, targets[:, -1:]], axis=1)


class Windows:
    """Random access to the windows of a token stream."""

    def __init__(self, tokens: Integer[np.ndarray, " N"], starts: Integer[np.ndarray, " windows"], seq_len: int):
        self._tokens, self._starts, self._seq_len = tokens, starts, seq_len

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Int32[np.ndarray, " T1"]:
        start = self._starts[index]
        return self._tokens[start : start + self._seq_len + 1].astype(np.int32)


class Batches:
    """An endless iterator over batches of shuffled windows, each int32 [batch_size / num_blocks, seq_len + 1].

    Args:
      tokens: a stream of token ids [N], memory-mapped or not.
      starts: of its windows, from `window_starts`; or packed windows.
      seq_len: inputs in a window.
      batch_size: windows in a batch, over all processes.
      seed: of the order.
      block, num_blocks: which of so many equal parts of a batch's rows to give (see `Trainer.block_of_rows`).
      text: a digest of the text, so that a position in other text is known as such; "": not checked.
      num_threads, prefetch: threads that read ahead, and batches they keep ready. They change no batch.

    Raises:
      ValueError: one line, when there are fewer windows than a batch takes.
    """

    def __init__(
        self,
        tokens: Integer[np.ndarray, " N"],
        starts: Any,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        block: int = 0,
        num_blocks: int = 1,
        text: str = "",
        num_threads: int = 0,
        prefetch: int = 4,
    ):
        windows = Windows(tokens, starts, seq_len) if isinstance(starts, np.ndarray) else starts
        if len(windows) < batch_size:
            raise ValueError(
                f"batch_size={batch_size} must not exceed the {len(windows)} windows of model.seq_len={seq_len} in the "
                f"training split; give more text, or try {_enough_windows(tokens, starts, batch_size)}"
            )
        # grain shuffles pass n by seed + n: neighbouring seeds would share their orders, one pass apart.
        shuffle_seed = int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "big"), digest_size=4).digest(), "big")
        self._numbers: Any = grain.MapDataset.source(range(len(windows))).shuffle(seed=shuffle_seed).repeat()
        self._windows: Any = self._numbers.map(windows.__getitem__)
        self._block, self._num_blocks, self._rows = block, num_blocks, batch_size // num_blocks
        self._options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        # What the order of examples depends on.
        self._num_windows, text_field = len(windows), {"text": text} if text else {}
        self._order: dict[str, int | str] = {"num_windows": len(windows), "seed": seed, **text_field}
        self._batch_size, self._examples = batch_size, 0  # examples given so far, over all processes
        self._iterator: Any = None  # from there on

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Int32[np.ndarray, "B T1"]:
        if self._iterator is None:
            blocks = self._windows[self._examples :].batch(self._rows, drop_remainder=True)
            self._iterator = iter(blocks[self._block :: self._num_blocks].to_iter_dataset(self._options))
        batch = next(self._iterator)
        self._examples += self._batch_size
        return batch

    @property
    def passes(self) -> float:
        """Passes over all windows so far."""
        return self._examples / self._num_windows

    def window_numbers(self, first: int) -> list[int]:
        """Which windows make up the batch, over all processes, that begins with example number `first`."""
        return [int(self._numbers[first + i]) for i in range(self._batch_size)]

    def get_state(self) -> dict[str, int | str]:
        """The position after the last batch, as JSON; the same on every process."""
        return {"examples": self._examples, **self._order}

    def is_in_this_text(self, state: Mapping[str, int | str]) -> bool:
        """Whether a position of `get_state` belongs to these windows in this order; one without a digest may."""
        return all(state.get(field, value) == value for field, value in self._order.items())

    def set_state(self, state: Mapping[str, int | str]) -> None:
        """Goes to a position of `get_state`, whatever the number of processes was.

        Raises:
          ValueError: one line, when the position belongs to other windows, or to another order of them.
        """
        for field, value in self._order.items():
            if state.get(field, value) != value:
                raise ValueError(
                    f"{field}={value} must be {state[field]}, as when the data position was saved; "
                    "set --config.corpus.changed=continue to go on with the weights, at the start of the text that is "
                    "there now, or bring back the windows and settings of that run"
                )
        self.close()
        self._examples = int(state["examples"])

    def close(self) -> None:
        """Ends the threads that read ahead, until another batch is asked for."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


def _enough_windows(tokens: Integer[np.ndarray, " N"], starts: Any, batch_size: int) -> str:
    """The setting that makes one batch of so few windows; shorter ones where there is none."""
    length = max(1, (len(tokens) - 1) // batch_size)
    return f"--config.batch_size={len(starts)}" if len(starts) else f"--config.model.seq_len={length}"
