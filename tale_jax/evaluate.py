"""How good a model is, exactly: every token of a split predicted once, per token, word and byte.

Two contexts. `stream` cuts the split into windows of the context length, each `stride` tokens after the one before, and
counts in each what the earlier ones did not: stride = context is the plain cut, a smaller stride a sliding window that
gives each token more to look back on. `document` scores each document from its own start.

The embedded tales have a known probability, so there the measure is `excess_nats_per_token`: nats of the model minus
nats of the grammar itself on the same text, 0 for a perfect model. Sampled tales are judged, and looked up in the
training text. Of any text, tales or not, `quality` tells whether samples are like held-out text (`quality.py`).

    python launch/evaluate.py --workdir=experiments/tales --split=test --json
    python launch/evaluate.py --workdir=experiments/wikitext2 --quality
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tale_jax import writing
from tale_jax.checkpoint import Experiment
from tale_jax.metrics import JsonlSink
from tale_jax.model.transformer import Transformer, count_parameters
from tale_jax.progress import Progress
from tale_jax.quality import table
from tale_jax.sample import Sampler, SampleSettings
from tale_jax.text import tales
from tale_jax.text.tokenizer import Tokenizer
from tale_jax.text.windows import document_starts, iter_documents, load_tokens
from tale_jax.training.step import token_losses

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
    """Nats of spans of a token stream, in batches of one shape, so that one program serves a whole split."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch_size: int, place: Callable = jnp.asarray):
        self.context, self.batch_size = model.config.seq_len, batch_size
        self._bos, self._pad, self._place = tokenizer.bos_id, tokenizer.pad_id, place

        def score(params: Any, windows: Int[Array, "B T1"], counted: Float[Array, "B T"]) -> Float[Array, " B"]:
            return jnp.sum(token_losses(model, params, windows, tokenizer.bos_id) * counted, axis=-1)

        self.score = jax.jit(score)

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
            counted *= windows[:, 1:] != self._bos
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
      context: "stream" or "document", as `windows` in the config.
      stride: tokens between windows; 0: the context length.
      max_windows: spans scored at most, spread evenly over the split; 0: all.
    """

    def __init__(
        self,
        workdir: Path,
        split: str,
        scorer: Scorer,
        tokenizer: Tokenizer,
        context: str,
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
        if context == "document":
            spans = list(document_spans(starts, len(self.tokens), scorer.context, self.stride))
        else:
            spans = list(stream_spans(len(self.tokens), scorer.context, self.stride))
        self.whole = not max_windows or len(spans) <= max_windows
        if not self.whole:
            spans = [spans[i * len(spans) // max_windows] for i in range(max_windows)]
        self.spans = spans
        self.truth = None
        if self.manifest.corpus["name"] == "tales" and context == "document":
            self.truth = _true_nats(self.tokens, starts, {document for *_, document in spans}, tokenizer)

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
            excess, error = tales.ratio((model[chosen] - truth).tolist(), lengths[chosen].tolist())
            result |= {
                "excess_nats_per_token": excess,
                "excess_nats_per_token_stderr": error,
                "floor_nats_per_token": float(truth.sum() / lengths.sum()),
            }
        return result


def evaluate(
    experiment: Experiment,
    split: str = "valid",
    stride: int = 0,
    num_samples: int = 200,
    sample_temperature: float = 0.7,
    seed: int = 0,
    with_quality: bool = False,
) -> dict[str, Any]:
    """All measures of a split, as `evaluate.py --json` prints them, kept in `evaluations.jsonl`.

    Losses are in nats, `bits_per_byte` in bits of the text's UTF-8 bytes; the end mark of each document is a token that
    is counted, its begin mark is not. `params` is the number of weights. For tales `num_samples` are judged too.
    `with_quality` adds `quality`, one result for each temperature (see `writing.measure_quality`), and writes
    `quality.jsonl`.
    """
    config, tokenizer, log = experiment.config, experiment.tokenizer, experiment.workdir / "log.txt"
    scorer = Scorer(experiment.model, tokenizer, config.evaluate.batch_size)
    evaluation = Evaluation(experiment.workdir, split, scorer, tokenizer, config.windows, stride)
    with Progress(f"evaluate {split}", total=len(evaluation.spans), unit="windows", log=log) as progress:
        result = evaluation(experiment.params, progress.advance)
    result |= {"step": experiment.step, "weights": experiment.weights, "params": count_parameters(experiment.params)}
    if evaluation.manifest.corpus["name"] == "tales" and num_samples:
        with Progress("judge samples", total=num_samples, unit="tales", log=log) as progress:
            result |= judge_samples(experiment, num_samples, sample_temperature, seed, progress.advance)
    if with_quality:
        result["quality"] = judge_quality(experiment, split, seed)
    JsonlSink(experiment.workdir / "evaluations.jsonl").write(result | {"time": time.time()})
    return result


def judge_quality(experiment: Experiment, split: str, seed: int) -> list[dict[str, Any]]:
    """Samples beside the text of a split, by all measures of `quality.py`; the samples go to `quality.jsonl`."""
    sampler = Sampler(experiment.model, experiment.params, experiment.tokenizer, batch_size=writing.BATCH_SIZE)
    (train, _), (held_out, _) = (load_tokens(experiment.workdir, name) for name in ("train", split))
    with Progress("sample", unit="texts", log=experiment.workdir / "log.txt") as progress:
        results, records = writing.measure_quality(sampler, train, held_out, seed=seed, advance=progress.advance)
    about = {"split": split, "step": experiment.step}
    writing.write_samples(experiment.workdir / "quality.jsonl", [record | about for record in records])
    return results


def describe(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` for people, line by line."""
    plain = {name: value for name, value in result.items() if name != "quality"}
    lines = [f"{k:>29}  {v:,.4f}" if isinstance(v, float) else f"{k:>29}  {v}" for k, v in plain.items()]
    for one in result.get("quality", ()):
        header, rows = table(one)
        cells = [["", *header], *rows]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header) + 1)]
        lines.append(f"{one['num_samples']} samples at temperature {one['temperature']:g}, {one['words']:,} words")
        for name, *values, verdict in cells:
            numbers = "  ".join(f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=False))
            lines.append(f"  {name:<{widths[0]}}  {numbers}  {verdict}")
    return "\n".join(lines)


def judge_samples(
    experiment: Experiment,
    num_samples: int,
    temperature: float,
    seed: int,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Tales sampled from the start of a document, judged: shares of 1.

    `accepted_share`: the grammar tells them and the world in them stays true. `consistent_share`: of those whose
    sentences are the grammar's, as far as the judge reads, the share whose world stays true. `copied_share`: found
    verbatim in the training text.
    """
    tokenizer = experiment.tokenizer
    settings = SampleSettings(max_tokens=experiment.config.model.seq_len - 1, temperature=temperature)
    sampler = Sampler(experiment.model, experiment.params, tokenizer)
    samples = []
    for piece in sampler.stream("", settings, num_samples=num_samples, seed=seed):
        if piece.sample:
            samples.append(piece.sample)
            advance(1)
    verdicts = [tales.judge(sample.text) for sample in samples]
    tokens, _ = load_tokens(experiment.workdir, "train")
    told = {sample.text for sample in samples}
    copied = {text for text in iter_documents(tokens, tokenizer) if text in told}
    accepted = sum(verdict.accepted for verdict in verdicts)
    untrue = sum(verdict.kind == "world" for verdict in verdicts)
    return {
        "sample_temperature": temperature,
        "num_samples": num_samples,
        "accepted_share": accepted / num_samples,
        "consistent_share": accepted / max(1, accepted + untrue),
        "copied_share": sum(sample.text in copied for sample in samples) / num_samples,
    }


def _true_nats(tokens: np.ndarray, starts: np.ndarray, wanted: set[int], tokenizer: Tokenizer) -> dict[int, float]:
    """Nats of the wanted documents under the grammar that told them."""
    ends = [*starts[1:], len(tokens)]
    nats = {}
    for number in wanted:
        text = tokenizer.decode(tokens[starts[number] + 1 : ends[number] - 1].tolist())
        verdict = tales.judge(text)
        assert verdict.accepted, f"a prepared tale is refused ({verdict.reason}): {text}"
        nats[number] = -verdict.logprob
    return nats


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
