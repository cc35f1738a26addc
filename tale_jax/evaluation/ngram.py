"""A 5-gram model of tokens: how likely a text is, given only four tokens before each.

Interpolated Kneser-Ney with one discount for each order (Kneser & Ney 1995; Chen & Goodman, "An empirical study of
smoothing techniques for language modeling", 1999, whose fixed discount n1 / (n1 + 2 n2) is used, n1 and n2 being the
numbers of n-grams that occur once and twice). Orders below the highest count after how many different tokens an n-gram
occurs, not how often, and the lowest is mixed with the uniform distribution, so that every token has a probability.

N-grams are numbered exactly, without hashing: the key of one of length n is the number of its first n-1 tokens times
the vocabulary size, plus its last token; keys stand in a sorted array. Three million tokens take some seconds.

    ngram = NgramModel(train_tokens, tokenizer.vocab_size)
    perplexity = math.exp(-ngram.logprobs(tokens).mean())
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Integer


class _Order(NamedTuple):
    """The n-grams of one length: what they add to the probability of their last token."""

    keys: Int64[np.ndarray, " ngrams"]  # number of the first n-1 tokens · V + the last token; sorted
    probabilities: Float64[np.ndarray, " ngrams"]  # discounted count, divided by the count of its first n-1 tokens
    backoff: Float64[np.ndarray, " contexts"]  # of each n-1 tokens: the weight of the order below


class NgramModel:
    """Trained on one stream of tokens, in which BOS and EOS separate the documents.

    Args:
      tokens: ids [N], N at least `order`, below `vocab_size`.
      vocab_size: V.
      order: length of the longest n-grams, the predicted token included.

    Raises:
      ValueError: one line, when there are fewer than `order` tokens.
    """

    def __init__(self, tokens: Integer[np.ndarray, " N"], vocab_size: int, order: int = 5):
        if len(tokens) < order:
            raise ValueError(
                f"the training text must hold at least {order} tokens, but has {len(tokens)}; give more text"
            )
        self.vocab_size = vocab_size
        tokens = np.asarray(tokens, np.int64)
        found = []  # keys and counts of each length
        contexts = np.zeros(len(tokens), np.int64)  # numbers of the n-1 tokens before each token from n-1 on
        shorter = contexts  # numbers of the (n-1)-grams in the stream, in order
        for n in range(1, order + 1):
            keys, numbers, counts = np.unique(
                contexts * vocab_size + tokens[n - 1 :], return_inverse=True, return_counts=True
            )
            if n > 1:  # how many different tokens precede each (n-1)-gram
                places = np.empty(len(keys), np.int64)  # one place of each n-gram in the stream
                places[numbers] = np.arange(len(numbers))
                found[-1][1] = np.bincount(shorter[places + 1], minlength=len(found[-1][0]))
            found.append([keys, counts])
            contexts, shorter = numbers[:-1], numbers
        self._orders = []
        num_contexts = 1
        for keys, counts in found:
            self._orders.append(_discounted(keys, counts, keys // vocab_size, num_contexts))
            num_contexts = len(keys)

    def logprobs(self, tokens: Integer[np.ndarray, " T"]) -> Float64[np.ndarray, " T"]:
        """Natural logarithm of the probability of each token, given the tokens before it in `tokens`."""
        tokens = np.asarray(tokens, np.int64)
        probability = np.full(len(tokens), 1 / self.vocab_size)
        contexts = np.zeros(len(tokens), np.int64)  # numbers of the tokens before each token; -1: not in the stream
        for keys, probabilities, backoff in self._orders:
            wanted = contexts * self.vocab_size + tokens
            place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            known, found = contexts >= 0, keys[place] == wanted
            mixed = found * probabilities[place] + backoff[contexts] * probability
            probability = np.where(known, mixed, probability)
            contexts = np.concatenate([[-1], np.where(found, place, -1)[:-1]]).astype(np.int64)
        return np.log(probability)


def _discounted(keys: np.ndarray, counts: np.ndarray, contexts: np.ndarray, num_contexts: int) -> _Order:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    discount = once / (once + 2 * twice) if once and twice else 0.75
    totals = np.bincount(contexts, counts, minlength=num_contexts)
    followers = np.bincount(contexts, counts > 0, minlength=num_contexts)
    divisors = np.maximum(totals, 1)  # what stands only at the very end of the stream is followed by nothing
    probabilities = np.maximum(counts - discount, 0) / divisors[contexts]
    return _Order(keys, probabilities, np.where(totals > 0, discount * followers / divisors, 1.0))
