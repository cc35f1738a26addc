"""Conversations → windows: whole ones beside each other, as many as fit, so that little is padding.

Each conversation begins a window of its own or follows another that ended; none is cut in two, and the model lets none
attend to another (the marks of `marks.py` tell where each begins). So the loss of a packed window is the sum of the
losses of its conversations. Only what is longer than a window loses its end.

    windows = PackedWindows(tokens, seq_len=256, pad_id=3)
    windows[0]                            # int32 [257], with marks
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int32, Int64, Integer

from tale_jax.config import Config
from tale_jax.data.loader import window_starts
from tale_jax.data.marks import ALL_LEARNED, FIRST, MARKED, begins_document, is_learned

OPEN_WINDOWS = 64  # that the next conversation may still go into


class PackedWindows:
    """Random access to the packed windows of a marked token stream; a sequence, as the starts of other windows are.

    Args:
      tokens: a stream with marks [N].
      seq_len: inputs in a window, which has one more token.
      pad_id: fills the rest of a window, as documents of one token that count nowhere.
      all_learned: every token of a conversation counts; else one with no learned token in the window is left out.
    """

    def __init__(self, tokens: Integer[np.ndarray, " N"], seq_len: int, pad_id: int, all_learned: bool = False):
        self._tokens, self._size, self._pad = tokens, seq_len + 1, max(0, pad_id) | FIRST
        starts = np.flatnonzero(begins_document(tokens, MARKED))
        lengths = np.diff(starts, append=len(tokens))
        longest = int(np.quantile(lengths, 0.9)) if len(lengths) else 1
        self.seq_len_for_most = 1 << (longest - 1).bit_length()  # a length that holds nine of ten conversations whole
        lengths = np.minimum(lengths, self._size)
        kind = ALL_LEARNED if all_learned else MARKED
        ends = zip(starts.tolist(), lengths.tolist(), strict=True)
        taught = [bool(is_learned(tokens[s + 1 : s + n], kind).any()) for s, n in ends]
        starts, lengths = starts[taught], lengths[taught]
        window_of = first_fit(lengths.tolist(), self._size)
        order = np.argsort(window_of, kind="stable")
        self._starts, self._lengths = starts[order], lengths[order]
        count = int(window_of.max()) + 1 if len(window_of) else 0
        self._bounds = np.searchsorted(window_of[order], np.arange(count + 1))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Int32[np.ndarray, " T1"]:
        window, at = np.full(self._size, self._pad, np.int32), 0
        for i in range(self._bounds[index], self._bounds[index + 1]):
            start, length = self._starts[i], self._lengths[i]
            window[at : at + length] = self._tokens[start : start + length]
            at += length
        return window


def first_fit(lengths: Iterable[int], size: int) -> Int64[np.ndarray, " N"]:
    """The window of each length: the first of the open ones with room for it, or else a new one."""
    windows: list[int] = []
    room: dict[int, int] = {}  # of the open windows, in order
    count = 0
    for length in lengths:
        found = next((number for number, left in room.items() if left >= length), -1)
        if found < 0:
            found, room[count], count = count, size, count + 1
            if len(room) > OPEN_WINDOWS:
                del room[min(room, key=lambda number: (room[number], number))]  # the fullest
        windows.append(found)
        room[found] = room.get(found, size) - length
        if room[found] < 2:  # a conversation has two tokens at least
            del room[found]
    return np.array(windows, np.int64)


def training_windows(
    tokens: Integer[np.ndarray, " N"], config: Config, bos_id: int, pad_id: int, chat: bool
) -> Integer[np.ndarray, " windows"] | PackedWindows:
    """The windows that a run learns from: by where they start, or, of conversations, packed ones."""
    if chat:
        windows = PackedWindows(tokens, config.model.seq_len, pad_id, all_learned=config.loss_on == "all")
        if not len(windows):
            raise ValueError(
                f"model.seq_len={config.model.seq_len} must hold a conversation up to its first answer, but the "
                f"training split has none so short; try --config.model.seq_len={windows.seq_len_for_most}"
            )
        return windows
    return window_starts(tokens, config.model.seq_len, bos_id if config.windows == "document" else None)
