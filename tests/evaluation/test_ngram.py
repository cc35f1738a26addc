"""The 5-gram model is a probability over the whole vocabulary, and that of a plain reference."""

import collections
import itertools

import numpy as np
import pytest

from tale_jax.evaluation.ngram import NgramModel

V = 7


def reference(stream, order):
    """Interpolated Kneser-Ney by the book, with dictionaries: (context, token) -> probability."""
    occurs = lambda n: list(zip(*(stream[i:] for i in range(n)), strict=False))  # noqa: E731
    counts = {}
    for n in range(1, order + 1):
        if n == order:
            counts[n] = collections.Counter(occurs(n))
        else:
            counts[n] = collections.Counter(gram[1:] for gram in set(occurs(n + 1)))
    discounts = {}
    for n, count in counts.items():
        once, twice = (sum(value == k for value in count.values()) for k in (1, 2))
        discounts[n] = once / (once + 2 * twice) if once and twice else 0.75

    def probability(context, token):
        n = len(context) + 1
        below = probability(context[1:], token) if context else 1 / V
        after = {gram: c for gram, c in counts[n].items() if gram[:-1] == tuple(context)}
        total, d = sum(after.values()), discounts[n]
        if not total:
            return below
        return max(after.get((*context, token), 0) - d, 0) / total + d * len(after) / total * below

    return probability


@pytest.fixture(scope="module")
def stream():
    rng = np.random.default_rng(0)
    return [int(token) for _ in range(60) for token in [0, *rng.integers(1, V - 1, rng.integers(1, 4)), 2, 3]]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_a_plain_reference(stream, order):
    model, wanted = NgramModel(np.array(stream, np.uint16), V, order), reference(stream, order)
    text = [0, 1, 2, 3, 0, 4, 6, 2, 3, 0, 5, 5, 5, 5, 5, 2, *stream[-9:]]
    expected = [wanted(tuple(text[max(0, i - order + 1) : i]), token) for i, token in enumerate(text)]
    np.testing.assert_allclose(np.exp(model.logprobs(np.array(text))), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "context", [(), (0,), (6,), (3, 0), (0, 1, 2, 3), (6, 6, 6, 6), (1, 6, 2, 3), (5, 5, 5, 5)], ids=str
)
def test_probabilities_sum_to_one(stream, context):
    """After contexts seen, unseen (6 never occurs) and half seen."""
    model = NgramModel(np.array(stream), V)
    chances = [np.exp(model.logprobs(np.array([*context, token]))[-1]) for token in range(V)]
    assert min(chances) > 0
    assert sum(chances) == pytest.approx(1, abs=1e-12)


def test_the_end_of_the_stream_is_followed_by_nothing_and_still_a_context(stream):
    model = NgramModel(np.array([*stream, 6]), V)  # the only 6: nothing is known to follow it
    chances = [np.exp(model.logprobs(np.array([6, token]))) for token in range(V)]
    assert sum(chance[-1] for chance in chances) == pytest.approx(1, abs=1e-12)


def test_text_it_learned_from_is_likelier_than_the_same_shuffled(stream):
    model, rng = NgramModel(np.array(stream), V), np.random.default_rng(1)
    shuffled = rng.permutation(stream)
    assert model.logprobs(np.array(stream)).mean() > model.logprobs(shuffled).mean() + 0.3


def test_too_little_text_is_told():
    with pytest.raises(ValueError, match="at least 5 tokens, but has 4"):
        NgramModel(np.arange(4), V)


def test_a_uniform_stream_is_uniform():
    stream = np.array(list(itertools.product(range(V), repeat=2))).ravel()
    assert NgramModel(np.tile(stream, 3), V, order=1).logprobs(np.arange(V)) == pytest.approx(np.log(1 / V))
