"""A 5-gram model of tokens: how likely a text is to one who looks back on four tokens only.

Interpolated Kneser-Ney with one discount for each order (Kneser & Ney 1995; Chen & Goodman, "An empirical study of
smoothing techniques for language modeling", 1999, whose fixed discount n1 / (n1 + 2 n2) is used, n1 and n2 being the
numbers of n-grams met once and twice). The order below the highest counts in how many different places an n-gram was
met, not how often, and the lowest is mixed with the uniform distribution, so that every token has a probability.

N-grams are numbered exactly, without hashing: one of length n is the number of its first n-1 tokens times the size of
the vocabulary, plus its last token, looked up in a sorted array. Three million tokens take some seconds.

    judge = NgramModel(train_tokens, tokenizer.vocab_size)
    perplexity = math.exp(-judge.logprobs(tokens).mean())
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Integer


class _Order(NamedTuple):
    """The n-grams of one length: what they add to the probability of their last token."""

    keys: Int64[np.ndarray, " grams"]  # number of the first n-1 tokens · V + the last; rising
    shares: Float64[np.ndarray, " grams"]  # discounted count over the count of what starts alike
    rest: Float64[np.ndarray, " contexts"]  # the probability that is left to the order below


class NgramModel:
    """Learned from one stream of tokens; documents need no borders but the marks that stand in it.

    Args:
      tokens: ids [N], N at least `order`, below `vocab_size`.
      vocab_size: V.
      order: the longest n-grams, the predicted token included.
    """

    def __init__(self, tokens: Integer[np.ndarray, " N"], vocab_size: int, order: int = 5):
        if len(tokens) < order:
            raise ValueError(f"the training text must hold at least {order} tokens, but has {len(tokens)}")
        self.vocab_size = vocab_size
        tokens = np.asarray(tokens, np.int64)
        found = []  # keys and counts of each length
        before = np.zeros(len(tokens), np.int64)  # numbers of the grams, one shorter, before each token from n-1 on
        shorter = before
        for n in range(1, order + 1):
            keys, numbers, counts = np.unique(
                before * vocab_size + tokens[n - 1 :], return_inverse=True, return_counts=True
            )
            if n > 1:  # in how many ways each gram one shorter is preceded
                somewhere = np.empty(len(keys), np.int64)
                somewhere[numbers] = np.arange(len(numbers))
                found[-1][1] = np.bincount(shorter[somewhere + 1], minlength=len(found[-1][0]))
            found.append([keys, counts])
            before, shorter = numbers[:-1], numbers
        self._orders = []
        contexts = 1
        for keys, counts in found:
            self._orders.append(_discounted(keys, counts, keys // vocab_size, contexts))
            contexts = len(keys)

    def logprobs(self, tokens: Integer[np.ndarray, " T"]) -> Float64[np.ndarray, " T"]:
        """Natural logarithms of the probability of each token after those before it in `tokens`, as far as they go."""
        tokens = np.asarray(tokens, np.int64)
        probability = np.full(len(tokens), 1 / self.vocab_size)
        before = np.zeros(len(tokens), np.int64)  # numbers of the grams before each token; -1: never met
        for keys, shares, rest in self._orders:
            wanted = before * self.vocab_size + tokens
            place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            known, met = before >= 0, keys[place] == wanted
            probability = np.where(known, met * shares[place] + rest[before] * probability, probability)
            before = np.concatenate([[-1], np.where(met, place, -1)[:-1]]).astype(np.int64)
        return np.log(probability)


def _discounted(keys: np.ndarray, counts: np.ndarray, before: np.ndarray, contexts: int) -> _Order:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    discount = once / (once + 2 * twice) if once and twice else 0.75
    totals = np.bincount(before, counts, minlength=contexts)
    followers = np.bincount(before, counts > 0, minlength=contexts)
    known = np.maximum(totals, 1)  # what stands only at the very end of the stream is followed by nothing
    shares = np.maximum(counts - discount, 0) / known[before]
    return _Order(keys, shares, np.where(totals > 0, discount * followers / known, 1.0))
