"""Documents that are nearly the same, and held-out text that occurs in training.

MinHash (Broder, "On the resemblance and containment of documents", 1997) by datasketch, over overlapping runs of 32
bytes of a document's words (`words_only`, so that other line ends, quotes or capitals make no difference). Documents
that agree in a band of the signature are joined; bands of 2 rows join what shares an eighth of its runs, as passages do
that overlap. Where this joins more than a printing or two, as the rows of a form letter, bands of 4, 8 and 16 rows do.

    with NearDuplicates() as near:
        for text in documents: near.add(text)
        clusters = near.clusters(max_share=0.05)     # [N], equal for documents that belong together

Memory: 12 bytes a document, and a temporary file of 512 bytes a document.
"""

import hashlib
import tempfile
from array import array

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8, UInt32, UInt64

from tale_jax.data.readers import words_only

SHINGLE_BYTES = 32
MAX_SHINGLES = 128  # of a document: those with the lowest hashes
NUM_PERMUTATIONS = 128
BAND_ROWS = (16, 8, 4, 2)  # from strict to loose; each divides the one before
MAX_PRINTINGS = 8  # so many documents may be joined whatever their share of the text is
MIN_WORD_BYTES = 8  # a document with fewer is compared by all its bytes

RUN_BYTES = 50
MAX_SAMPLED_RUNS = 1 << 20  # of a split: 12 MB
SEGMENT_BYTES = 1 << 17  # of a document, hashed at once
MAX_COMPARED_BYTES = 1 << 20  # of a document

_BASE = 0x9E3779B97F4A7C15
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53), np.uint64(33))


def run_hashes(data: bytes, width: int) -> UInt64[np.ndarray, " runs"]:
    """A hash of each run of `width` bytes of `data`, which is as long or longer, in order."""
    block, size, power = np.frombuffer(data, np.uint8).astype(np.uint64) + np.uint64(1), 1, _BASE
    result, done = np.zeros(len(data), np.uint64), 0  # of runs of `done` bytes
    while True:  # of 1, 2, 4, … bytes, put together as the binary digits of `width` say
        if width & size:
            count = len(block) - done
            result = result[:count] * np.uint64(power) + block[done:] if done else block
            done += size
        if done == width:
            return _mixed(result)
        block = block[:-size] * np.uint64(power) + block[size:]
        size, power = 2 * size, power * power % 2**64


def _mixed(hashes: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """The same hashes with every bit depending on all others."""
    first, second, shift = _MIX
    hashes = (hashes ^ (hashes >> shift)) * first
    hashes = (hashes ^ (hashes >> shift)) * second
    return hashes ^ (hashes >> shift)


class NearDuplicates:
    """Takes documents one by one and says which belong together."""

    def __init__(self) -> None:
        from datasketch import MinHash  # scipy with it takes most of a second

        self._empty = MinHash(NUM_PERMUTATIONS, seed=1, hashfunc=int, scheme="affine32")
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._sizes, self._hashes = array("Q"), array("Q")

    def __enter__(self) -> "NearDuplicates":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, text: str) -> int:
        """Adds the next document, and returns its size in bytes."""
        data = text.encode()
        self._hashes.append(text_hash(data))
        self._sizes.append(len(data))
        self._file.write(self._signature(data).tobytes())
        return len(data)

    @property
    def last_position(self) -> float:
        """The position (`positions`) that the newest document has by itself."""
        return self._hashes[-1] / 2**48

    def _signature(self, data: bytes) -> UInt32[np.ndarray, " permutations"]:
        words = words_only(data)
        if len(words) < MIN_WORD_BYTES:
            words = data
        words = words[:MAX_COMPARED_BYTES]
        shingles = run_hashes(words, min(SHINGLE_BYTES, len(words)))
        if len(shingles) > MAX_SHINGLES:
            shingles = np.partition(shingles, MAX_SHINGLES)[:MAX_SHINGLES]
        signature = self._empty.copy()
        signature.update_batch((shingles >> np.uint64(32)).tolist())
        return signature.hashvalues.astype(np.uint32)

    def positions(self, clusters: Int64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
        """For each document a number in [0, 1): the hash of one of its cluster's texts, which depends on no name."""
        hashes = np.array(self._hashes, np.uint64)
        if not len(hashes):
            return np.zeros(0)
        order = np.lexsort((_mixed(hashes), clusters))
        first = np.r_[True, np.diff(clusters[order]) != 0]
        representative = np.zeros(clusters.max() + 1, np.uint64)
        representative[clusters[order][first]] = hashes[order][first]
        return representative[clusters].astype(np.float64) / 2.0**48

    def sizes(self) -> Int64[np.ndarray, " N"]:
        """Bytes of each document."""
        return np.array(self._sizes, np.int64)

    def clusters(self, max_share: float) -> Int64[np.ndarray, " N"]:
        """For each document the number of its cluster, from 0 on.

        A cluster of more than `MAX_PRINTINGS` documents and more than `max_share` of the bytes is divided by stricter
        bands, in the end into those of equal texts.
        """
        count = len(self)
        if not count:
            return np.zeros(0, np.int64)
        self._file.flush()
        signatures = np.memmap(self._file, np.uint32, "r", shape=(count, NUM_PERMUTATIONS))
        sizes = self.sizes()
        _, equal = np.unique(np.array(self._hashes, np.uint64), return_inverse=True)
        labels = chosen = equal.astype(np.int64)
        for rows in BAND_ROWS:
            for column in range(0, NUM_PERMUTATIONS, rows):
                labels = _joined(labels, _combined(signatures[:, column : column + rows]))
            members, weights = np.bincount(labels), np.bincount(labels, sizes)
            small = (members <= MAX_PRINTINGS) | (weights <= max_share * sizes.sum())
            chosen = np.where(small[labels], labels + count, chosen)  # the loosest that is small: clusters are nested
            _, chosen = np.unique(chosen, return_inverse=True)
            chosen = chosen.astype(np.int64)
        return chosen


def text_hash(data: bytes) -> int:
    """48 bits that depend on the text alone."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "big")


def _combined(columns: UInt32[np.ndarray, "N rows"] | UInt64[np.ndarray, "N rows"]) -> UInt64[np.ndarray, " N"]:
    """One number for each row."""
    keys = np.zeros(len(columns), np.uint64)
    for column in range(columns.shape[1]):
        keys = keys * np.uint64(_BASE) + columns[:, column] + np.uint64(1)
    return keys


def _joined(labels: Int64[np.ndarray, " N"], keys: UInt64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
    """Labels in which documents of one key have one label, and with them all that had theirs."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    left, right = labels[order][:-1][same], labels[order][1:][same]
    differ = left != right
    if not differ.any():
        return labels
    left, right, size = left[differ], right[differ], int(labels.max()) + 1
    graph = coo_matrix((np.ones(len(left), bool), (left, right)), shape=(size, size))
    return connected_components(graph, directed=False)[1].astype(np.int64)[labels]


class RunSample:
    """Hashes of runs of 50 bytes of a stream of documents: all of them, or of a long one those with a certain start."""

    def __init__(self) -> None:
        self._runs: list[UInt64[np.ndarray, " runs"]] = []
        self._starts: list[UInt32[np.ndarray, " runs"]] = []  # a hash of the first four bytes of each run
        self._size, self._bits = 0, 0  # kept are the runs whose start has so many zero bits

    def add(self, text: str) -> None:
        """Adds the next document."""
        data = text.encode()
        for place in range(0, len(data) - RUN_BYTES + 1, SEGMENT_BYTES):
            self._add_segment(np.frombuffer(data[place : place + SEGMENT_BYTES + RUN_BYTES - 1], np.uint8))
        while self._size > MAX_SAMPLED_RUNS:
            self._bits += 1
            runs, starts = self._kept(self._bits)
            self._runs, self._starts, self._size = [runs], [starts], len(runs)

    def _add_segment(self, data: UInt8[np.ndarray, " N"]) -> None:
        windows = np.lib.stride_tricks.sliding_window_view(data, RUN_BYTES)
        wide = data[: len(windows) + 3].astype(np.uint32)
        starts = wide[:-3] | wide[1:-2] << 8 | wide[2:-1] << 16 | wide[3:] << 24
        starts = starts * np.uint32(0x9E3779B1)
        starts ^= starts >> np.uint32(15)
        kept = np.flatnonzero(_is_zero(starts, self._bits))
        padded = np.zeros((len(kept), 56), np.uint8)
        padded[:, :RUN_BYTES] = windows[kept]
        self._runs.append(_mixed(_combined(padded.view(np.uint64))))
        self._starts.append(starts[kept])
        self._size += len(kept)

    def _kept(self, bits: int) -> tuple[UInt64[np.ndarray, " runs"], UInt32[np.ndarray, " runs"]]:
        """The runs, and their starts, that a sample with so many zero bits has."""
        if not self._runs:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint32)
        runs, starts = np.concatenate(self._runs), np.concatenate(self._starts)
        kept = _is_zero(starts, bits)
        return runs[kept], starts[kept]

    def share_in(self, other: "RunSample") -> float | None:
        """The share of these runs that occur among the others; None where there is no run to look for."""
        bits = max(self._bits, other._bits)
        mine, theirs = self._kept(bits)[0], other._kept(bits)[0]
        return float(np.isin(mine, theirs).mean()) if len(mine) else None


def _is_zero(hashes: UInt32[np.ndarray, " N"], bits: int) -> Bool[np.ndarray, " N"]:
    return hashes & np.uint32((1 << bits) - 1) == 0
