"""Nats of text, exactly: every token of a split predicted once, per token, word and byte.

Two contexts. `stream` cuts the split into windows of the context length, each `stride` tokens after the one before, and
counts in each what the earlier ones did not: stride = context is the plain cut, a smaller stride a sliding window that
gives each token more to look back on. `document` scores each document from its own start.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tale_jax.data.tales.grammar import ratio
from tale_jax.data.token_files import document_starts, load_tokens
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.evaluation.tales import grammar_nats
from tale_jax.model.loss import loss_mask
from tale_jax.model.transformer import Transformer, token_losses

# One span to score: start of its window in the stream, first and last + 1 of the tokens it predicts, its document.
Span = tuple[int, int, int, int]


def stream_spans(num_tokens: int, context: int, stride: int) -> Iterator[Span]:
    """Windows over the whole stream; every token but the first is predicted once, with up to `context` before it."""
    scored = 1
    for start in range(0, max(1, num_tokens - 1), stride):
        end = min(start + context + 1, num_tokens)
        if end > scored:
            yield start, scored, end, 0
            scored = end


def document_spans(starts: Int[np.ndarray, " N"], num_tokens: int, context: int, stride: int) -> Iterator[Span]:
    """The same within each document, given where documents start; long ones take several spans."""
    for number, (begin, end) in enumerate(zip(starts, [*starts[1:], num_tokens], strict=True)):
        for start, first, last, _ in stream_spans(int(end - begin), context, stride):
            yield int(begin) + start, int(begin) + first, int(begin) + last, number


class Scorer:
    """Nats of spans of a token stream, in batches of one shape, so that one program serves a whole split.

    Args:
      model: the decoder.
      tokenizer: whose ids are scored.
      batch_size: spans scored at once, rounded up to a multiple of `num_devices`.
      place: puts a whole batch, which every process holds alike, on the devices.
      num_devices: that share a batch.
      out_sharding: of the result; where several processes share the devices, each must see all of it.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        batch_size: int,
        place: Callable[[np.ndarray], Array] = jnp.asarray,
        num_devices: int = 1,
        out_sharding: Any = None,
    ):
        self.context = model.config.seq_len
        self.batch_size = -(-batch_size // num_devices) * num_devices  # as many rows on each device
        self._bos, self._pad, self._place = tokenizer.bos_id, tokenizer.pad_id, place

        def score(params: Any, windows: Int[Array, "B T1"], counted: Float[Array, "B T"]) -> Float[Array, " B"]:
            return jnp.sum(token_losses(model, params, windows, tokenizer.bos_id) * counted, axis=-1)

        self.score = jax.jit(score, out_shardings=out_sharding)

    def __call__(
        self, params: Any, tokens: np.ndarray, spans: Iterable[Span], advance: Callable[[int], None] = lambda n: None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns, per span, its nats, the number of tokens counted, and its document. BOS marks are not counted."""
        nats, counts, documents = [], [], []
        for batch in _batches(spans, self.batch_size):
            windows = np.full((self.batch_size, self.context + 1), self._pad, np.int32)
            counted = np.zeros((self.batch_size, self.context), np.float32)
            for row, (start, first, last, _) in enumerate(batch):
                windows[row, : last - start] = tokens[start:last]
                counted[row, first - start - 1 : last - start - 1] = 1
            counted *= loss_mask(windows[:, 1:], self._bos)
            scored = self.score(params, self._place(windows), self._place(counted))
            nats.append(np.asarray(scored, np.float64)[: len(batch)])
            counts.append(counted.sum(axis=1)[: len(batch)])
            documents.append([document for *_, document in batch])
            advance(len(batch))
        return np.concatenate(nats), np.concatenate(counts), np.concatenate(documents)


class Evaluation:
    """A split of a workdir made ready to be scored, again and again while training or once after it.

    Args:
      workdir: where the windows lie.
      split: train, valid or test.
      scorer: compiled for the model.
      tokenizer: that of the workdir.
      windows: "stream" or "document", as `windows` in the config.
      stride: tokens between windows; 0: the context length.
      max_windows: spans scored at most, spread evenly over the split; 0: all.
    """

    def __init__(
        self,
        workdir: Path,
        split: str,
        scorer: Scorer,
        tokenizer: Tokenizer,
        windows: str,
        stride: int = 0,
        max_windows: int = 0,
    ):
        self.split, self.scorer, self.stride = split, scorer, stride or scorer.context
        if not 0 < self.stride <= scorer.context:
            raise ValueError(
                f"stride={stride} must be at most the context of {scorer.context} tokens; try {scorer.context // 2}"
            )
        self.tokens, self.manifest = load_tokens(workdir, split)
        starts = document_starts(self.tokens, tokenizer.bos_id)
        if windows == "document":
            spans = list(document_spans(starts, len(self.tokens), scorer.context, self.stride))
        else:
            spans = list(stream_spans(len(self.tokens), scorer.context, self.stride))
        self.whole = not max_windows or len(spans) <= max_windows
        if not self.whole:
            spans = [spans[i * len(spans) // max_windows] for i in range(max_windows)]
        self.spans = spans
        self.truth = None
        if self.manifest.corpus["name"] == "tales" and windows == "document":
            self.truth = grammar_nats(self.tokens, starts, {document for *_, document in spans}, tokenizer)

    def __call__(self, params: Any, advance: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
        """Scores the spans. Measures per byte and word assume the split's own tokens per byte when it is not whole."""
        nats, counts, documents = self.scorer(params, self.tokens, self.spans, advance)
        total, tokens, manifest = float(nats.sum()), int(counts.sum()), self.manifest
        share = tokens / (manifest.tokens - manifest.documents)
        result = {
            "split": self.split,
            "tokens": tokens,
            "words": manifest.words if self.whole else round(manifest.words * share),
            "bytes": manifest.bytes if self.whole else round(manifest.bytes * share),
            "nats_per_token": total / tokens,
            "token_perplexity": _exp(total / tokens),
        }
        result["word_perplexity"] = _exp(total / result["words"])
        result["bits_per_byte"] = total / math.log(2) / result["bytes"]
        result["context"], result["stride"] = self.scorer.context, self.stride
        if self.truth is not None:
            model, lengths = (np.bincount(documents, weights) for weights in (nats, counts))
            chosen = np.flatnonzero(lengths)
            truth = np.array([self.truth[document] for document in chosen.tolist()])
            excess, error = ratio((model[chosen] - truth).tolist(), lengths[chosen].tolist())
            result |= {
                "excess_nats_per_token": excess,
                "excess_nats_per_token_stderr": error,
                "floor_nats_per_token": float(truth.sum() / lengths.sum()),
            }
        return result


def _batches(items: Iterable[Span], size: int) -> Iterator[list[Span]]:
    batch: list[Span] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
