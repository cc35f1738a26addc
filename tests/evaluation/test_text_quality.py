"""Each measure refuses the writer it was made for, and real held-out text is in range of them all."""

import json
import random

import numpy as np
import pytest

from tale_jax.data.tales import grammar as tales
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.evaluation.ngram import NgramModel
from tale_jax.evaluation.text_quality import (
    LIMITS,
    Continuation,
    distinct_share,
    first_words,
    found_share,
    ngrams_in_documents,
    ngrams_to_find,
    quality_measures,
    quality_record,
    quality_rows,
    repeated_share,
)

COUNT = 60


@pytest.fixture(scope="module")
def tokenizer(trained):
    return Tokenizer.load(trained / "tokenizer" / "tokenizer.model")


@pytest.fixture(scope="module")
def training():
    return [tales.tell(i, "train", 0).text for i in range(400)]


@pytest.fixture(scope="module")
def ngram_model(tokenizer, training):
    streams = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in training]
    return NgramModel(np.concatenate(streams), tokenizer.vocab_size)


def halves(text):
    """The first 20 words, and what follows."""
    start = first_words(text, 20)
    return Continuation(start, text[len(start) :])


@pytest.fixture(scope="module")
def held_out():
    return [halves(tales.tell(i, "valid", 0).text) for i in range(2 * COUNT)]


@pytest.fixture(scope="module")
def check(held_out, ngram_model, tokenizer, training):
    """Names of the measures that refuse texts put in the place of the continuations, and all measures."""

    def checked(texts):
        samples = [Continuation(each.prompt, text) for each, text in zip(held_out[:COUNT], texts, strict=True)]
        found = ngrams_in_documents(ngrams_to_find([*samples, *held_out]), training)
        measures = quality_measures(samples, held_out[COUNT:], ngram_model, tokenizer.encode, found)
        assert list(measures) == list(LIMITS)
        return {name for name, one in measures.items() if not one.in_range}, measures

    return checked


def shuffled(text, seed):
    words = text.split()
    random.Random(seed).shuffle(words)
    return " " + " ".join(words)


def looped(text):
    return (" " + " ".join(text.split()[:6])) * 20


def test_held_out_text_is_in_range(check, held_out):
    refused, measures = check([each.text for each in held_out[:COUNT]])
    assert not refused
    assert all(one.verdict == "in range" for one in measures.values())
    assert all(one.ratio is None or 0.5 < one.ratio < 2 for name, one in measures.items() if name != "repetition")


def test_what_is_beyond_the_shorter_text_counts_for_length_alone(check, held_out):
    refused, measures = check([each.text + " zap" * 400 for each in held_out[COUNT:]])
    assert refused == {"length"} and measures["length"].verdict == "too high: does not end"
    for name in ("repetition", "distinct_1", "distinct_2", "distinct_3", "new_words", "copying"):
        assert measures[name].samples == measures[name].held_out
    assert measures["ngram_perplexity"].ratio == pytest.approx(1, abs=0.05)  # after prompts of others


def test_a_loop_is_refused(check, held_out):
    refused, measures = check([looped(each.text) for each in held_out[:COUNT]])
    assert {"repetition", "distinct_2", "distinct_3"} <= refused
    assert measures["repetition"].verdict == "too high: repeats itself"
    assert measures["repetition"].samples > 0.8


def test_one_word_again_and_again_is_refused(check):
    refused, measures = check([" the" * 120] * COUNT)
    assert {"repetition", "distinct_1", "distinct_2", "distinct_3"} <= refused
    assert measures["distinct_1"].verdict == "too low: few words"


def test_shuffled_words_are_refused_by_the_5_gram_model(check, held_out):
    refused, measures = check([shuffled(each.text, i) for i, each in enumerate(held_out[:COUNT])])
    assert {"ngram_perplexity"} <= refused
    assert measures["ngram_perplexity"].verdict.startswith("too high")
    assert not {"length", "repetition", "distinct_1", "new_words"} & refused  # these do not see the order


def test_copies_of_the_training_text_are_refused(check, training):
    """Though much of any tale stands in the training text, and only the 5-gram model and this measure can see it."""
    refused, measures = check([halves(text).text for text in training[:COUNT]])
    assert "copying" in refused
    assert measures["copying"].samples == 1
    assert not {"length", "repetition", "distinct_1", "distinct_2", "distinct_3"} & refused


def test_made_up_words_are_refused(check, held_out):
    refused, _ = check([each.text.replace("e", "ozu") for each in held_out[:COUNT]])
    assert {"new_words", "ngram_perplexity"} <= refused


@pytest.mark.parametrize("text", ["", " The end."], ids=["nothing", "two words"])
def test_a_model_that_stops_at_once_is_refused(check, text):
    refused, measures = check([text] * COUNT)
    assert "length" in refused
    assert measures["length"].verdict == "too low: ends too early"
    records = {name: quality_record(one, one) for name, one in measures.items()}
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert measures["ngram_perplexity"].in_range == (measures["ngram_perplexity"].verdict == "in range")
    if not text:
        assert "ngram_perplexity" in refused and records["ngram_perplexity"]["samples"] is None
        assert quality_rows({"measures": records})[1][0][1] == "0.0"


def test_what_is_too_easy_for_the_5_gram_model_is_refused_too():
    """Words at random, which nothing can predict but a model that has memorised the training text."""
    rng = np.random.default_rng(0)
    write = lambda: Continuation("", " ".join(str(number) for number in rng.integers(0, 200, 100)))  # noqa: E731
    encode = lambda text: np.array([int(word) for word in text.split()], np.int64)  # noqa: E731
    read, held_out, honest = ([write() for _ in range(20)] for _ in range(3))
    ngram_model = NgramModel(np.concatenate([encode(each.text) for each in read]), 200)
    fair, copied = (
        quality_measures(samples, held_out, ngram_model, encode, set())["ngram_perplexity"]
        for samples in (honest, read)
    )
    assert fair.in_range and fair.held_out == pytest.approx(200, rel=0.3)
    assert copied.verdict == "too low: loops, set phrases or copies" and copied.ratio < 0.1


def test_measures_count_what_they_say():
    assert repeated_share(["a b c d a b c d".split()], 4) == pytest.approx(1 / 5)
    assert repeated_share(["a b c d".split(), "a b c d".split()], 4) == 0  # within a text only
    assert distinct_share(["a b a".split(), "a b".split()], 1) == pytest.approx(2 / 5)
    assert distinct_share(["a b a".split(), "a b".split()], 2) == pytest.approx(2 / 3)  # none over the border
    wanted = {("a", "b"), ("b", "c"), ("d",), ("z",)}
    assert ngrams_in_documents(wanted, ["x a b", "c d"]) == {("a", "b"), ("d",)}
    assert found_share(["a b c".split()], {("a", "b")}, 2) == 0.5
    assert repeated_share([[]]) == distinct_share([], 2) == found_share([["a"]], set()) == 0
    assert (
        first_words(" a  b\nc d", 3) == " a  b\nc" and first_words(" a b \n", 9) == " a b" and not first_words("a", 0)
    )


def test_bounds_leave_room_for_shares_of_nothing_and_of_all():
    for limits in LIMITS.values():
        for held_out in (0.0, 0.01, 0.5, 0.9):
            lower, upper = limits.bounds(held_out)
            assert lower <= held_out <= upper
            if limits.is_share:
                assert upper <= 1
            if limits.keep_from_one:
                assert held_out < upper < 1
