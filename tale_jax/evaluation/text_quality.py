"""Does a model write like its corpus? Its samples, measured beside held-out text of the same length.

A low perplexity does not keep a model from repeating itself and from dull words when it generates (Holtzman et al.,
"The curious case of neural text degeneration", ICLR 2020). So the model continues fixed prompts with fixed seeds, and
each measure is taken twice: of its samples, and of held-out text. What counts is the difference.

  length      words of a text.
  repetition  share of a text's 4-grams of words that it has had before (as `rep-n` in Welleck et al., ICLR 2020).
  distinct_n  different n-grams of words over all of them, of all texts together (Li et al., NAACL 2016).
  new_words   share of words that the training text does not have: names, and words that the model makes up of tokens.
  ngram_perplexity  perplexity of the texts under a 5-gram model of the training text (`ngram.py`): too low for loops
              and copies, too high for words in a wrong order.
  copying     share of 8-grams of words that stand in the training text (after Lee et al., "Deduplicating training data
              makes language models better", ACL 2022, who look for longer ones, in larger text).

Words are separated by white space, so nothing but the 5-gram model depends on the tokenizer. A measure is in range
within bounds around its held-out value (`LIMITS`). Held-out text is also compared with other held-out text: that ratio
would be 1 but for chance, and shows how much of a difference chance explains. None of this knows what a text means:
fluent nonsense is in range by every measure, so a verdict says no more than that.

    found = ngrams_in_documents(ngrams_to_find(texts), documents)
    measures = quality_measures(samples, held_out, ngram_model, tokenizer.encode, found)
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tale_jax.evaluation.ngram import NgramModel

REPEATED, COPIED = 4, 8  # lengths of n-grams, in words
IN_RANGE = "in range"  # the verdict on a measure that lies within its bounds
OLD_IN_RANGE = "as held-out text"  # the same in evaluations.jsonl of version 0.2
NOT_TESTED = "Not tested: sense. Text without any can be in range by every measure."

Ngram = tuple[str, ...]  # of words


class Continuation(NamedTuple):
    """A text, and the prompt it continues."""

    prompt: str
    text: str


@dataclasses.dataclass(frozen=True)
class Limits:
    """The bounds of a measure, and what it means to lie outside.

    Lower: `min_factor` times the held-out value h. Upper: `max_factor` · h + `margin`, for a share of 1 at most 1, or,
    where `keep_from_one`, at most halfway from h to 1.
    """

    about: str
    min_factor: float | int
    max_factor: float | int
    too_low: str
    too_high: str
    margin: float | int = 0.0
    is_share: bool = False
    keep_from_one: bool = False

    def bounds(self, held_out: float | int) -> tuple[float, float]:
        upper = self.max_factor * held_out + self.margin
        if self.is_share:
            upper = min(upper, (1 + held_out) / 2 if self.keep_from_one else 1.0)
        return self.min_factor * held_out, upper


LIMITS = {
    "length": Limits("words of a text", 0.5, 2, "ends too early", "does not end"),
    "repetition": Limits("4-grams that the text had before", 0, 2, "", "repeats itself", 0.02, True, True),
    "distinct_1": Limits("different words", 0.67, 1.5, "few words", "words at random", is_share=True),
    "distinct_2": Limits("different 2-grams", 0.8, 1.25, "few phrases", "words at random", is_share=True),
    "distinct_3": Limits("different 3-grams", 0.8, 1.25, "few phrases", "words at random", is_share=True),
    "new_words": Limits("words not in the training text", 0, 2, "", "made-up words", 0.02, True, True),
    "ngram_perplexity": Limits(
        "perplexity under a 5-gram model", 0.5, 2, "loops, set phrases or copies", "odd words or word order"
    ),
    "copying": Limits("8-grams found in the training text", 0, 2, "", "copies the training text", 0.05, True, True),
}


@dataclasses.dataclass(frozen=True)
class QualityMeasure:
    """One measure of the samples beside held-out text of the same length, in the same unit.

    Attributes:
      samples, held_out: the values.
      lower, upper: the range of held-out text, with an allowance.
      ratio: samples over held_out; None where held_out is 0.
      in_range: whether the samples lie within the bounds.
      verdict: "in range", or what it means to lie outside.
    """

    samples: float
    held_out: float
    lower: float
    upper: float
    ratio: float | None
    in_range: bool
    verdict: str


def ngrams(words: Sequence[str], n: int) -> Iterator[Ngram]:
    """All n-grams of words, in order."""
    return zip(*(words[i:] for i in range(n)), strict=False)


def repeated_share(texts: Iterable[Sequence[str]], n: int = REPEATED) -> float:
    """Share of the n-grams that the same text had before, over all texts; 0 if there are none."""
    of_texts = [list(ngrams(words, n)) for words in texts]
    total = sum(map(len, of_texts))
    return 1 - sum(len(set(each)) for each in of_texts) / total if total else 0.0


def distinct_share(texts: Iterable[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams, of the texts together; 0 if there are none. It falls as text gets longer."""
    found = [ngram for words in texts for ngram in ngrams(words, n)]
    return len(set(found)) / len(found) if found else 0.0


def found_share(texts: Iterable[Sequence[str]], found: set[Ngram], n: int = COPIED) -> float:
    """Share of the n-grams that are among the ones `found` in the training text; 0 if there are none."""
    searched = [ngram for words in texts for ngram in ngrams(words, n)]
    return sum(ngram in found for ngram in searched) / len(searched) if searched else 0.0


def ngrams_to_find(texts: Iterable[Continuation]) -> set[Ngram]:
    """The n-grams to look for in the training text, for `quality_measures`: words, and 8-grams."""
    split = [continuation.text.split() for continuation in texts]
    return {ngram for words in split for n in (1, COPIED) for ngram in ngrams(words, n)}


def ngrams_in_documents(wanted: set[Ngram], documents: Iterable[str]) -> set[Ngram]:
    """Those of the wanted n-grams, of whatever lengths, that occur in a document. Documents are read once."""
    lengths = {len(ngram) for ngram in wanted}
    found: set[Ngram] = set()
    for text in documents:
        words = text.split()
        for n in lengths:
            found.update(wanted.intersection(ngrams(words, n)))
    return found


def ngram_perplexity(
    texts: Iterable[Continuation], ngram_model: NgramModel, encode: Callable[[str], np.ndarray]
) -> float:
    """exp(nats per token) of the texts under the n-gram model, given their prompts; NaN if there is no token."""
    total, count = 0.0, 0
    for prompt, text in texts:
        first, tokens = len(encode(prompt)), encode(prompt + text)
        total -= float(ngram_model.logprobs(tokens)[first:].sum())
        count += max(0, len(tokens) - first)
    return math.exp(total / count) if count else math.nan


def quality_measures(
    samples: Sequence[Continuation],
    held_out: Sequence[Continuation],
    ngram_model: NgramModel,
    encode: Callable[[str], np.ndarray],
    found: set[Ngram],
) -> dict[str, QualityMeasure]:
    """All measures of the samples, by name. Sample i is measured beside held-out text i, both cut to the shorter one.

    Args:
      samples, held_out: as many of one as of the other.
      ngram_model: of the training text.
      encode: text to its tokens.
      found: those of the words and 8-grams of both that stand in the training text:
        `ngrams_in_documents(ngrams_to_find(texts), documents)`.
    """
    lengths = [(len(one.text.split()), len(other.text.split())) for one, other in zip(samples, held_out, strict=True)]

    def measured(texts: Sequence[Continuation]) -> dict[str, float]:
        shortened = [Continuation(each.prompt, first_words(each.text, min(pair))) for each, pair in zip(texts, lengths)]
        words = [each.text.split() for each in shortened]
        distinct = {f"distinct_{n}": distinct_share(words, n) for n in (1, 2, 3)}
        return {
            "repetition": repeated_share(words),
            **distinct,
            "new_words": 1 - found_share(words, found, 1) if any(words) else 0.0,
            "ngram_perplexity": ngram_perplexity(shortened, ngram_model, encode),
            "copying": found_share(words, found),
        }

    of_samples, of_held_out = (
        {"length": sum(each) / max(1, len(each)), **measured(texts)}
        for texts, each in zip((samples, held_out), zip(*lengths, strict=True), strict=True)
    )
    return {name: _quality_measure(limits, of_samples[name], of_held_out[name]) for name, limits in LIMITS.items()}


def _quality_measure(limits: Limits, samples: float, held_out: float) -> QualityMeasure:
    lower, upper = limits.bounds(held_out)
    verdict = IN_RANGE
    if not lower <= samples:  # also NaN, of no text at all
        verdict = f"too low: {limits.too_low}"
    elif samples > upper:
        verdict = f"too high: {limits.too_high}"
    ratio = samples / held_out if held_out else None
    return QualityMeasure(samples, held_out, lower, upper, ratio, lower <= samples <= upper, verdict)


def first_words(text: str, count: int) -> str:
    """The first `count` words of a text, with the white space between them as it is."""
    rest = text.split(None, count)[count:]
    return text[: len(text) - len(rest[0])].rstrip() if rest else text.rstrip()


def quality_record(measure: QualityMeasure, control: QualityMeasure) -> dict[str, Any]:
    """A measure in JSON's types, with the ratio of other held-out text as `control_ratio`; None where not finite."""
    fields = dataclasses.asdict(measure) | {"control_ratio": control.ratio}
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in fields.items()}


def quality_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One temperature's result as a table, human-readable: a header, and rows that start with what is measured."""
    rows = []
    for name, measure in result["measures"].items():
        form = "{:.1f}" if name in ("length", "ngram_perplexity") else "{:.3f}"
        forms = dict.fromkeys(("samples", "held_out", "lower", "upper"), form)
        forms |= dict.fromkeys(("ratio", "control_ratio"), "{:.2f}")
        shown = {key: "–" if measure[key] is None else form.format(measure[key]) for key, form in forms.items()}
        title = f"{name}: {LIMITS[name].about}" if name in LIMITS else name
        values = [shown[key] for key in ("samples", "held_out", "ratio", "control_ratio")]
        verdict = IN_RANGE if measure["verdict"] == OLD_IN_RANGE else measure["verdict"]
        rows.append([title, *values, f"{shown['lower']} to {shown['upper']}", verdict])
    return ["samples", "held-out", "ratio", "by chance", "range", "verdict"], rows
