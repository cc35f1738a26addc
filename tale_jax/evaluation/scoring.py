"""Nats of text, exactly: every token of a split predicted once, per token, word and byte.

Two ways to choose the context of a token. `stream` takes windows of the context length, each `stride` tokens after the
one before, and counts in each the tokens that the earlier ones did not: with stride = context the windows touch, with a
smaller stride they slide, and each token has more context. `document` scores each document from its own start.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from tale_jax.data.marks import begins_document
from tale_jax.data.prepare import DOCUMENT_DEVIATION
from tale_jax.data.tales.grammar import ratio
from tale_jax.data.token_files import document_starts, load_tokens
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.evaluation.tales import grammar_nats
from tale_jax.model.loss import loss_mask
from tale_jax.model.transformer import Transformer, token_losses

MIN_DOCUMENTS = 30  # of which the standard error is taken over documents


class Span(NamedTuple):
    """Tokens `first` to `last` - 1 of a stream, predicted from those since `start`, where the window starts."""

    start: int
    first: int
    last: int
    document: int = 0  # its number in the split; 0 where windows do not follow documents


def stream_spans(num_tokens: int, context: int, stride: int) -> Iterator[Span]:
    """Windows over the whole stream; every token but the first is predicted once, with up to `context` before it."""
    scored = 1
    for start in range(0, max(1, num_tokens - 1), stride):
        end = min(start + context + 1, num_tokens)
        if end > scored:
            yield Span(start, scored, end)
            scored = end


def document_spans(starts: Int[np.ndarray, " N"], num_tokens: int, context: int, stride: int) -> Iterator[Span]:
    """The same within each document, given where documents start; a document longer than the context takes several."""
    for number, (begin, end) in enumerate(zip(starts, [*starts[1:], num_tokens], strict=True)):
        for start, first, last, _ in stream_spans(int(end - begin), context, stride):
            yield Span(int(begin) + start, int(begin) + first, int(begin) + last, number)


def first_document_spans(
    tokens: Integer[np.ndarray, " N"], window_starts: Integer[np.ndarray, " windows"], context: int, bos_id: int
) -> Iterator[Span]:
    """The first document of each training window, without the opening of the next one, or of several, after it."""
    for start in window_starts.tolist():
        end = min(start + context + 1, len(tokens))
        next_bos = np.flatnonzero(begins_document(tokens[start + 1 : end], bos_id))
        yield Span(start, start + 1, start + 1 + int(next_bos[0]) if len(next_bos) else end)


class Scorer:
    """Nats of spans of a token stream, in batches of one shape, so that one program serves a whole split.

    Args:
      model: the decoder.
      tokenizer: that of the token ids.
      batch_size: spans scored at once, rounded up to a multiple of `num_devices`.
      place: puts a whole batch, the same on every process, on the devices.
      num_devices: that share a batch.
      out_sharding: of the result; where several processes share the devices, each must see all of it.
      bos_id: by which the streams are read (`marks.py`); None: that of the tokenizer.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        batch_size: int,
        place: Callable[[np.ndarray], Array] = jnp.asarray,
        num_devices: int = 1,
        out_sharding: Any = None,
        bos_id: int | None = None,
    ):
        self.context = model.config.seq_len
        self.batch_size = -(-batch_size // num_devices) * num_devices  # as many rows on each device
        self._bos = bos = tokenizer.bos_id if bos_id is None else bos_id
        self._pad, self._place = max(0, tokenizer.pad_id), place

        def score(params: Any, windows: Int[Array, "B T1"], counted: Float[Array, "B T"]) -> Float[Array, " B"]:
            return jnp.sum(token_losses(model, params, windows, bos) * counted, axis=-1)

        self.score = jax.jit(score, out_shardings=out_sharding)

    def __call__(
        self, params: Any, tokens: np.ndarray, spans: Iterable[Span], advance: Callable[[int], None] = lambda n: None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each span its nats, the number of tokens that count (all but BOS), and the number of its document."""
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
    """A split of a workdir that can be scored, again and again during training or once after it.

    Args:
      workdir: where the windows lie.
      split: train, valid or test.
      scorer: of the model.
      tokenizer: that of the workdir.
      windows: "stream" or "document", as `windows` in the config.
      stride: tokens between windows; 0: the context length.
      max_windows: spans scored at most, spread evenly over the split; 0: all.
      advance: gets the number of tales whose entropy is newly known.

    Raises:
      ValueError: one line, for a split that is not prepared, or a stride longer than the context.
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
        advance: Callable[[int], None] = lambda n: None,
    ):
        self.split, self.scorer, self.stride = split, scorer, stride or scorer.context
        if not 0 < self.stride <= scorer.context:
            raise ValueError(
                f"stride={stride} must be at most the context of {scorer.context} tokens; "
                f"try --stride={max(1, scorer.context // 2)}"
            )
        self.tokens, self.manifest = load_tokens(workdir, split)
        starts = document_starts(self.tokens, tokenizer.bos_id)
        if windows == "document" or self.manifest.chat:
            spans = list(document_spans(starts, len(self.tokens), scorer.context, self.stride))
        else:
            spans = list(stream_spans(len(self.tokens), scorer.context, self.stride))
        self.whole, self.split_windows = not max_windows or len(spans) <= max_windows, len(spans)
        if not self.whole:
            spans = [spans[i * len(spans) // max_windows] for i in range(max_windows)]
        self.spans = spans
        self.grammar_nats: dict[int, float] | None = None  # of the scored documents, by number
        if self.manifest.corpus["name"] == "tales" and windows == "document":
            self.grammar_nats = grammar_nats(self.tokens, starts, {span.document for span in spans}, tokenizer, advance)

    def __call__(self, params: Any, advance: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
        """The measures of the split, by name. Where not all of it is scored, words and bytes are estimated from its
        tokens.

        A measure is None where it has no value. `excess_nats_per_token` is above the entropy of the tales, with its
        standard error over tales. `nats_per_token_stderr` is that of the loss as an estimate for all text that such
        documents come from; `windows` of the `split_windows` that the split has were scored.
        """
        nats, counts, documents = self.scorer(params, self.tokens, self.spans, advance)
        total, tokens, manifest = float(nats.sum()), int(counts.sum()), self.manifest
        share = tokens / max(1, manifest.chat.get("learned_tokens", manifest.tokens - manifest.documents))
        result = {
            "split": self.split,
            "tokens": tokens,
            "words": manifest.words if self.whole else round(manifest.words * share),
            "bytes": manifest.bytes if self.whole else round(manifest.bytes * share),
            "documents": manifest.documents,
            "texts": manifest.texts or manifest.documents,
            "windows": len(self.spans),
            "split_windows": self.split_windows,
            "nats_per_token": per(total, tokens),
            "nats_per_token_stderr": self._standard_error(nats, counts, documents),
            "token_perplexity": _exp(per(total, tokens)),
            "word_perplexity": _exp(per(total, manifest.words if self.whole else manifest.words * share)),
            "bits_per_byte": per(total / math.log(2), manifest.bytes if self.whole else manifest.bytes * share),
        }
        result["context"], result["stride"] = self.scorer.context, self.stride
        if self.grammar_nats is not None:
            model, lengths = (np.bincount(documents, weights) for weights in (nats, counts))
            scored = np.flatnonzero(lengths)
            grammar = np.array([self.grammar_nats[document] for document in scored.tolist()])
            excess, error = ratio((model[scored] - grammar).tolist(), lengths[scored].tolist())
            result |= {
                "excess_nats_per_token": excess,
                "excess_nats_per_token_stderr": error,
                "floor_nats_per_token": per(float(grammar.sum()), float(lengths.sum())),
            }
        return result

    def _standard_error(self, nats: np.ndarray, counts: np.ndarray, documents: np.ndarray) -> float | None:
        """Of nats per token, by how much documents differ, where windows follow them and they are many.

        Else by how much windows differ, and, since those of one document are alike, by how much documents usually do.
        """
        totals, lengths = (np.bincount(documents, weights) for weights in (nats, counts))
        scored = np.flatnonzero(lengths)
        if len(scored) >= MIN_DOCUMENTS:
            return ratio(totals[scored].tolist(), lengths[scored].tolist())[1]
        if np.count_nonzero(counts) < 2:
            return None
        return math.hypot(
            ratio(nats.tolist(), counts.tolist())[1], DOCUMENT_DEVIATION / math.sqrt(self.manifest.documents)
        )


def _batches(items: Iterable[Span], size: int) -> Iterator[list[Span]]:
    batch: list[Span] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def per(total: float | int, count: float | int) -> float | None:
    """None, which JSON writes as null, where there is nothing to divide by: text without a word, say."""
    return total / count if count else None


def _exp(nats: float | None) -> float | None:
    """None where the perplexity is beyond all numbers, or there is none."""
    return math.exp(nats) if nats is not None and nats < 700 else None
