"""What a model writes when it is asked: fixed prompts, fixed seeds, and the measures of `quality.py` on the result.

One text for each prompt, so that the texts are about as different things as held-out text is. Three prompts of four are
openings of held-out text, spread evenly over the split; the fourth is one of `PROMPTS`. With each text goes a held-out
piece of the same length, and as many more are kept to see what chance does. Nothing is chosen: all texts are kept, in
`quality.jsonl`.

    python launch/evaluate.py --workdir=experiments/wikitext2 --quality
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from tale_jax.data.token_files import document_starts, iter_documents
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.evaluation.ngram import NgramModel
from tale_jax.evaluation.text_quality import Continuation, Gram, as_record, common_grams, compare, searched
from tale_jax.inference.sampler import Sampler, SampleSettings

# Half for text that informs, half for text that tells; every fourth sample follows one of them, in this order.
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
OPENING, LENGTH = 32, 160  # tokens of an opening, and of what follows it, at most
TEMPERATURES = (0.8, 1.0)
BATCH_SIZE = 16
NGRAM_TOKENS = 5_000_000  # of the training text, at most, for the 5-gram model


def held_out_pieces(
    tokens: Integer[np.ndarray, " N"], tokenizer: Tokenizer, opening: int, length: int, most: int
) -> list[Continuation]:
    """At most `most` pieces of documents, spread evenly over a split, each an opening and what follows it.

    Documents are cut every `opening + length` tokens; what is left at the end counts only in short documents. The
    opening begins and ends where words do.
    """
    starts = document_starts(tokens, tokenizer.bos_id).tolist()
    spans = []
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        begin, end = start + 1, end - 1  # without its marks
        spans += [(b, b + opening + length) for b in range(begin, end - opening - length + 1, opening + length)]
        if 2 * opening <= end - begin < opening + length:
            spans.append((begin, end))
    if len(spans) > most:
        spans = [spans[i * len(spans) // most] for i in range(most)]
    pieces = []
    for begin, end in spans:
        ids = tokens[begin:end].tolist()
        borders = [i for i, token in enumerate(ids) if i == 0 or tokenizer.token_bytes[token][:1] in (b" ", b"\n")]
        inside = tokens[begin - 1] != tokenizer.bos_id and len(borders) > 1 and borders[1] < opening
        first = borders[1] if inside else 0
        cut = next((i for i in borders if i >= opening), opening)
        pieces.append(Continuation(tokenizer.decode(ids[first:cut]), tokenizer.decode(ids[cut:])))
    return [piece for piece in pieces if piece.prompt.strip() and piece.text.strip()]


def sample_each(
    sampler: Sampler,
    prompts: Sequence[str],
    length: int,
    temperature: float,
    seed: int,
    advance: Callable[[int], None] = lambda n: None,
) -> list[dict[str, Any]]:
    """One text for each prompt, as they are kept: `prompt text tokens finished temperature seed number`."""
    settings = SampleSettings(max_tokens=length, temperature=temperature, long_prompt="window")
    records = []
    for piece in sampler.stream_each(prompts, settings, seed=seed):
        if sample := piece.sample:
            about = {"temperature": temperature, "seed": seed, "number": piece.number}
            drawn = {"text": sample.text, "tokens": sample.tokens, "finished": sample.finished}
            records.append({"prompt": prompts[piece.number]} | drawn | about)
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
    """Draws the samples and measures them.

    Args:
      sampler: of the model.
      train, held_out: token streams of the training split and of one the model has not seen.
      temperatures: to sample at, each measured by itself.
      seed: of the draws.
      advance: told the samples that are done; there are at most `NUM_SAMPLES` for each temperature.

    Returns:
      for each temperature `temperature num_samples words passes measures`, the measures by name with the fields of
      `QualityMeasure` and `other_ratio`, the ratio of other held-out text; and all samples (see `sample_each`).

    Raises:
      ValueError: one line, when the held-out text is too short.
    """
    tokenizer, context = sampler.tokenizer, sampler.context
    opening = min(OPENING, context // 4)
    length = min(LENGTH, context - opening - 1)
    pieces = held_out_pieces(held_out, tokenizer, opening, length, 2 * NUM_SAMPLES)
    if len(pieces) < 8:
        raise ValueError(
            f"the held-out split must hold at least 8 texts of {2 * opening} tokens to compare samples with, "
            f"but has {len(pieces)}; try --split=train to see how it works, or hold out more text"
        )
    references, others = pieces[: len(pieces) // 2 * 2 : 2], pieces[1::2]
    published = iter(PROMPTS)
    prompts = [next(published) if i % 4 == 3 else piece.prompt for i, piece in enumerate(references)]
    records = [sample_each(sampler, prompts, length, t, seed, advance) for t in temperatures]
    drawn = [[Continuation(record["prompt"], record["text"]) for record in group] for group in records]
    ngram = NgramModel(_spread(train, NGRAM_TOKENS), tokenizer.vocab_size)
    wanted: set[Gram] = set().union(*(searched(group) for group in (references, others, *drawn)))
    trained = common_grams(wanted, iter_documents(train, tokenizer))
    null = compare(others, references, ngram, tokenizer.encode, trained)
    results = []
    for temperature, group in zip(temperatures, drawn, strict=True):
        measures = compare(group, references, ngram, tokenizer.encode, trained)
        plain = {name: as_record(one, null[name]) for name, one in measures.items()}
        about = {"temperature": temperature, "num_samples": len(group)}
        about["words"] = sum(len(piece.text.split()) for piece in group)
        results.append(about | {"passes": all(one.passes for one in measures.values()), "measures": plain})
    return results, [record for group in records for record in group]


def write_samples(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Puts all samples of an evaluation into a file, in the place of those of the one before."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.replace(path)


def _spread(tokens: Integer[np.ndarray, " N"], most: int, stretches: int = 64) -> Integer[np.ndarray, " M"]:
    """At most `most` tokens of a stream, in stretches spread evenly over it."""
    if len(tokens) <= most:
        return np.asarray(tokens)
    size = most // stretches
    return np.concatenate([tokens[i * len(tokens) // stretches :][:size] for i in range(stretches)])
