"""Does a model write like its corpus? Texts it draws, measured beside held-out text of the same length.

Likelihood does not see what a model says when it speaks for itself: a good perplexity goes together with loops and dull
words (Holtzman et al., "The curious case of neural text degeneration", ICLR 2020). So a fixed set of prompts, openings
of held-out text among them, is followed with fixed seeds, and each measure is taken twice, of what the model wrote and
of what stands in held-out text. Neither number says much alone; how far they lie apart does.

  length      words until a text ends.
  repetition  share of a text's runs of 4 words that it has had before (as `rep-n` in Welleck et al., ICLR 2020).
  distinct_n  different runs of n words over all runs, of all texts together (Li et al., NAACL 2016).
  new_words   share of words that the training text does not have: names, and what a model of word pieces makes up.
  ngram_perplexity  perplexity of the texts to a 5-gram model of the training text (`text/ngram.py`): too low for loops
              and recitals, too high for words in a wrong order.
  copying     share of runs of 8 words that stand in the training text (after Lee et al., "Deduplicating training data
              makes language models better", ACL 2022, who look for longer ones, in larger text).

A word is what stands between white space, so nothing but the n-gram model depends on the tokenizer. A measure passes
between bounds around the held-out value (`LIMITS`). Held-out text is measured against other held-out text too: that
ratio would be 1 without chance, and shows how much of a difference is luck. None of this knows what a text means:
fluent nonsense passes.

    measures = compare(samples, held_out, ngram, tokenizer.encode, common_grams(searched(pieces), documents))
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tale_jax.evaluation.ngram import NgramModel

REPEATED, COPIED = 4, 8  # words of the runs

Gram = tuple[str, ...]


class Continuation(NamedTuple):
    """A text and what it follows."""

    prompt: str
    text: str


@dataclasses.dataclass(frozen=True)
class Limits:
    """The bounds of a measure, given its held-out value h, and what it means to lie outside.

    Least: low · h. Most: high · h + more, but for a share at most 1, and where `halfway`, halfway from h to 1.
    """

    about: str
    low: float | int
    high: float | int
    too_low: str
    too_high: str
    more: float | int = 0.0
    share: bool = False
    halfway: bool = False

    def bounds(self, held_out: float | int) -> tuple[float, float]:
        upper = self.high * held_out + self.more
        if self.share:
            upper = min(upper, (1 + held_out) / 2 if self.halfway else 1.0)
        return self.low * held_out, upper


LIMITS = {
    "length": Limits("words until a text ends", 0.5, 2, "ends too early", "does not end"),
    "repetition": Limits("runs of 4 words met before in the text", 0, 2, "", "repeats itself", 0.02, True, True),
    "distinct_1": Limits("different words", 0.67, 1.5, "few words", "words at random", share=True),
    "distinct_2": Limits("different pairs of words", 0.8, 1.25, "few turns of phrase", "words at random", share=True),
    "distinct_3": Limits("different runs of 3 words", 0.8, 1.25, "few turns of phrase", "words at random", share=True),
    "new_words": Limits("words not in the training text", 0, 2, "", "made-up words", 0.02, True, True),
    "ngram_perplexity": Limits(
        "perplexity to a 5-gram model", 0.5, 2, "loops, set phrases or copies", "odd words or word order"
    ),
    "copying": Limits(
        "runs of 8 words found in training text", 0, 2, "", "recites the training text", 0.05, True, True
    ),
}


@dataclasses.dataclass(frozen=True)
class QualityMeasure:
    """One measure of the samples beside held-out text of the same length, in the same unit.

    Attributes:
      samples, held_out: the values.
      lower, upper: the bounds within which the samples pass.
      ratio: samples over held_out; None where held_out is 0.
      passes: whether the samples lie within the bounds.
      verdict: "as held-out text", or what it means to lie outside.
    """

    samples: float
    held_out: float
    lower: float
    upper: float
    ratio: float | None
    passes: bool
    verdict: str


def grams(words: Sequence[str], n: int) -> Iterator[Gram]:
    """All runs of n words, in order."""
    return zip(*(words[i:] for i in range(n)), strict=False)


def repeated_share(texts: Iterable[Sequence[str]], n: int = REPEATED) -> float:
    """Share of the runs of n words that stood before in the same text, over all texts; 0 if there are no runs."""
    runs = [list(grams(words, n)) for words in texts]
    total = sum(map(len, runs))
    return 1 - sum(len(set(one)) for one in runs) / total if total else 0.0


def distinct_share(texts: Iterable[Sequence[str]], n: int) -> float:
    """Different runs of n words over all runs, of the texts together; it falls as text gets longer. 0 without runs."""
    runs = [gram for words in texts for gram in grams(words, n)]
    return len(set(runs)) / len(runs) if runs else 0.0


def common_grams(wanted: set[Gram], documents: Iterable[str]) -> set[Gram]:
    """Those of the wanted runs of words, of whatever lengths, that occur in a document. Documents are read once."""
    lengths = {len(gram) for gram in wanted}
    found: set[Gram] = set()
    for text in documents:
        words = text.split()
        for n in lengths:
            found.update(wanted.intersection(grams(words, n)))
    return found


def searched(pieces: Iterable[Continuation]) -> set[Gram]:
    """The runs of words to look for in the training text, for `compare`."""
    texts = [piece.text.split() for piece in pieces]
    return {gram for words in texts for n in (1, COPIED) for gram in grams(words, n)}


def found_share(texts: Iterable[Sequence[str]], trained: set[Gram], n: int = COPIED) -> float:
    """Share of the runs of n words that are among those of the training text; 0 if there are no runs."""
    runs = [gram for words in texts for gram in grams(words, n)]
    return sum(gram in trained for gram in runs) / len(runs) if runs else 0.0


def ngram_perplexity(pieces: Iterable[Continuation], ngram: NgramModel, encode: Callable[[str], np.ndarray]) -> float:
    """exp(nats per token) of the texts to the n-gram model, after the prompts; they are spelled anew. NaN if empty."""
    total, count = 0.0, 0
    for prompt, text in pieces:
        first, tokens = len(encode(prompt)), encode(prompt + text)
        total -= float(ngram.logprobs(tokens)[first:].sum())
        count += max(0, len(tokens) - first)
    return math.exp(total / count) if count else math.nan


def compare(
    samples: Sequence[Continuation],
    held_out: Sequence[Continuation],
    ngram: NgramModel,
    encode: Callable[[str], np.ndarray],
    trained: set[Gram],
) -> dict[str, QualityMeasure]:
    """All measures of the samples, by name, the i-th of them beside the i-th held-out piece, each cut to the shorter.

    Args:
      samples, held_out: as many of one as of the other.
      ngram: model of the training text.
      encode: text to its tokens.
      trained: words and runs of 8 words of the training text, at least those that occur in the pieces; that is
        `common_grams(searched(pieces), documents)`.
    """
    lengths = [(len(one.text.split()), len(other.text.split())) for one, other in zip(samples, held_out, strict=True)]

    def values(pieces: Sequence[Continuation]) -> dict[str, float]:
        shortened = [
            Continuation(piece.prompt, first_words(piece.text, min(pair))) for piece, pair in zip(pieces, lengths)
        ]
        words = [piece.text.split() for piece in shortened]
        distinct = {f"distinct_{n}": distinct_share(words, n) for n in (1, 2, 3)}
        perplexity = ngram_perplexity(shortened, ngram, encode)
        new = 1 - found_share(words, trained, 1) if any(words) else 0.0
        return {"repetition": repeated_share(words), **distinct, "new_words": new, "ngram_perplexity": perplexity,
                "copying": found_share(words, trained)}  # fmt: skip

    own, other = (
        {"length": sum(each) / max(1, len(each)), **values(pieces)}
        for pieces, each in zip((samples, held_out), zip(*lengths, strict=True), strict=True)
    )
    return {name: _measure(limits, own[name], other[name]) for name, limits in LIMITS.items()}


def _measure(limits: Limits, samples: float, held_out: float) -> QualityMeasure:
    lower, upper = limits.bounds(held_out)
    verdict = "as held-out text"
    if not lower <= samples:  # NaN, of no text at all, too
        verdict = f"too low: {limits.too_low}"
    elif samples > upper:
        verdict = f"too high: {limits.too_high}"
    ratio = samples / held_out if held_out else None
    return QualityMeasure(samples, held_out, lower, upper, ratio, lower <= samples <= upper, verdict)


def first_words(text: str, count: int) -> str:
    """The text up to the end of its word number `count`, white space between words as it is."""
    rest = text.split(None, count)[count:]
    return text[: len(text) - len(rest[0])].rstrip() if rest else text.rstrip()


def as_record(measure: QualityMeasure, other: QualityMeasure) -> dict[str, Any]:
    """The fields of a measure in JSON's types, and the ratio of the other as `other_ratio`; no number is None."""
    fields = dataclasses.asdict(measure) | {"other_ratio": other.ratio}
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in fields.items()}


def quality_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One temperature's result human-readable: a header, and rows that start with what is measured."""
    rows = []
    for name, one in result["measures"].items():
        value = "{:.1f}" if name in ("length", "ngram_perplexity") else "{:.3f}"
        forms = {"samples": value, "held_out": value, "lower": value, "upper": value} | dict.fromkeys(
            ("ratio", "other_ratio"), "{:.2f}"
        )
        told = {key: "–" if one[key] is None else form.format(one[key]) for key, form in forms.items()}
        title = f"{name}: {LIMITS[name].about}" if name in LIMITS else name
        allowed = f"{told['lower']} to {told['upper']}"
        rows.append(
            [title, *(told[k] for k in ("samples", "held_out", "ratio", "other_ratio")), allowed, one["verdict"]]
        )
    return ["samples", "held-out", "ratio", "by chance", "allowed", "verdict"], rows
