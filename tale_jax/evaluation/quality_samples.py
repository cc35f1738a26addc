"""Samples for `text_quality.py`: fixed prompts, fixed seeds, and held-out text of the same length beside each.

Three prompts of four are openings of held-out text, spread evenly over the split, so that the samples are about as many
things as held-out text is; the fourth is one of `PROMPTS`. With each sample goes a held-out text of the same length;
others are kept to see what chance does. No sample is selected: all are kept, in `quality.jsonl`.

    python launch/evaluate.py --workdir=experiments/wikitext2 --quality
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from tale_jax.data.token_files import document_starts, iter_documents
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.evaluation.ngram import NgramModel
from tale_jax.evaluation.text_quality import (
    Continuation,
    Ngram,
    ngrams_in_documents,
    ngrams_to_find,
    quality_measures,
    quality_record,
)
from tale_jax.inference.sampler import Sampler, SampleSettings
from tale_jax.utils.files import json_line, write_atomically

# In turn for text that informs and for text that narrates; every fourth sample continues one of them, in this order.
PROMPTS = (
    "The city lies on the northern bank of the river and",
    "Once upon a time there was",
    "The species was first described by",
    "The old woman opened the door and",
    "The album was released in the spring of that year and",
    "When the children came home that evening they",
    "During the war the regiment was sent to",
    "The king had three daughters and",
    "He was born in a small village near",
    "She looked out of the window and saw",
    "The bridge was built by",
    "It was a dark night and the wind",
    "The storm reached the coast early in the morning and",
    "The boy ran down to the harbour to",
    "In the second half of the game the home team",
    "They walked through the forest until",
)
NUM_SAMPLES = 64  # at most
MIN_TEXTS = 8  # to compare with
OPENING, LENGTH = 32, 160  # tokens of a prompt, and of the text that continues it, at most
TEMPERATURES = (0.8, 1.0)
BATCH_SIZE = 16
NGRAM_TOKENS = 5_000_000  # of the training text, at most, for the 5-gram model


def held_out_texts(
    tokens: Integer[np.ndarray, " N"], tokenizer: Tokenizer, opening: int, length: int, max_count: int
) -> list[Continuation]:
    """At most `max_count` texts of documents, spread evenly over a split, each an opening and what continues it.

    Documents are cut every `opening + length` tokens; the remainder at the end counts only in short documents. The
    opening begins and ends between words.
    """
    starts = document_starts(tokens, tokenizer.bos_id).tolist()
    spans = []
    for document_start, document_end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        start, end = document_start + 1, document_end - 1  # without BOS and EOS
        spans += [(i, i + opening + length) for i in range(start, end - opening - length + 1, opening + length)]
        if 2 * opening <= end - start < opening + length:
            spans.append((start, end))
    if len(spans) > max_count:
        spans = [spans[i * len(spans) // max_count] for i in range(max_count)]
    texts = []
    for start, end in spans:
        ids = tokens[start:end].tolist()
        word_starts = [i for i, id in enumerate(ids) if i == 0 or tokenizer.token_bytes[id][:1] in (b" ", b"\n")]
        in_a_word = tokens[start - 1] != tokenizer.bos_id and len(word_starts) > 1 and word_starts[1] < opening
        first = word_starts[1] if in_a_word else 0
        middle = next((i for i in word_starts if i >= opening), opening)
        texts.append(Continuation(tokenizer.decode(ids[first:middle]), tokenizer.decode(ids[middle:])))
    return [each for each in texts if each.prompt.strip() and each.text.strip()]


def sample_lengths(context: int) -> tuple[int, int]:
    """Tokens of an opening, and of what continues it."""
    opening = min(OPENING, context // 4)
    return opening, min(LENGTH, context - opening - 1)


def texts_to_compare(held_out: Integer[np.ndarray, " N"], tokenizer: Tokenizer, context: int) -> list[Continuation]:
    """The held-out texts beside which samples are measured. Raises ValueError, in one line, where there are too few."""
    opening, length = sample_lengths(context)
    texts = held_out_texts(held_out, tokenizer, opening, length, 2 * NUM_SAMPLES) if opening and length > 0 else []
    if len(texts) < MIN_TEXTS:
        raise ValueError(
            f"--quality must find at least {MIN_TEXTS} texts of {2 * opening} tokens in the split to compare samples "
            f"with, but found {len(texts)}; try another --split, or give more text, or raise corpus.held_out (of "
            "tales: corpus.num_valid_tales), in a new --workdir"
        )
    return texts


def sample_records(
    sampler: Sampler,
    prompts: Sequence[str],
    length: int,
    temperature: float,
    seed: int,
    advance: Callable[[int], None] = lambda n: None,
) -> list[dict[str, Any]]:
    """One sample for each prompt, as `prompt text tokens finish_reason temperature seed number`."""
    settings = SampleSettings(max_tokens=length, temperature=temperature, long_prompt="window")
    records = []
    for delta in sampler.stream_prompts(prompts, settings, seed=seed):
        if sample := delta.sample:
            record: dict[str, Any] = {"prompt": prompts[delta.number], "text": sample.text, "tokens": sample.tokens}
            record |= {"finish_reason": sample.finish_reason, "temperature": temperature, "seed": seed}
            records.append(record | {"number": delta.number})
            advance(1)
    return records


def measure_quality(
    sampler: Sampler,
    train: Integer[np.ndarray, " N"],
    held_out: Integer[np.ndarray, " M"],
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Samples texts and measures them.

    Args:
      sampler: of the model.
      train, held_out: token streams of the training split and of one that the model has not seen.
      temperatures: to sample at, each measured by itself.
      seed: of the random numbers.
      advance: gets the number of samples that are newly done; there are at most `NUM_SAMPLES` for each temperature.

    Returns:
      for each temperature `temperature num_samples words in_range not_tested measures`: whether all measures are in
      range, and what none of them tests; the measures by name with the fields of `QualityMeasure` and `control_ratio`,
      the ratio of other held-out text. And all samples (see `sample_records`).

    Raises:
      ValueError: one line, when the held-out text is too short.
    """
    tokenizer = sampler.tokenizer
    length = sample_lengths(sampler.context)[1]
    texts = texts_to_compare(held_out, tokenizer, sampler.context)
    references, controls = texts[: len(texts) // 2 * 2 : 2], texts[1::2]
    published = iter(PROMPTS)
    prompts = [next(published) if i % 4 == 3 else text.prompt for i, text in enumerate(references)]
    records = [sample_records(sampler, prompts, length, t, seed, advance) for t in temperatures]
    samples = [[Continuation(record["prompt"], record["text"]) for record in group] for group in records]
    ngram_model = NgramModel(spread_tokens(train, NGRAM_TOKENS), tokenizer.vocab_size)
    wanted: set[Ngram] = set().union(*(ngrams_to_find(group) for group in (references, controls, *samples)))
    found = ngrams_in_documents(wanted, iter_documents(train, tokenizer))
    by_chance = quality_measures(controls, references, ngram_model, tokenizer.encode, found)
    results = []
    for temperature, group in zip(temperatures, samples, strict=True):
        measures = quality_measures(group, references, ngram_model, tokenizer.encode, found)
        result: dict[str, Any] = {"temperature": temperature, "num_samples": len(group)}
        result["words"] = sum(len(sample.text.split()) for sample in group)
        result["in_range"] = all(measure.in_range for measure in measures.values())
        result["not_tested"] = "sense"
        result["measures"] = {name: quality_record(measure, by_chance[name]) for name, measure in measures.items()}
        results.append(result)
    return results, [record for group in records for record in group]


def write_samples(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes all samples of an evaluation, one JSON object a line, in place of those of the one before."""
    write_atomically(path, "".join(json_line(record) + "\n" for record in records))


def spread_tokens(tokens: Integer[np.ndarray, " N"], max_count: int, parts: int = 64) -> Integer[np.ndarray, " M"]:
    """At most `max_count` tokens of a stream, in parts that are spread evenly over it."""
    if len(tokens) <= max_count:
        return np.asarray(tokens)
    size = max_count // parts
    return np.concatenate([tokens[i * len(tokens) // parts :][:size] for i in range(parts)])
