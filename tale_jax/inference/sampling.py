"""Sampling of one token: bias, penalties, temperature and filters on its logits, as pure functions.

In this order: logit bias, repetition penalty (Keskar et al. 2019), frequency and presence penalty (of OpenAI's API),
temperature, top-k, top-p (the nucleus of Holtzman et al. 2020), min-p (Nguyen et al. 2024), each on what the ones
before it kept. Everything is a reduction over the vocabulary, and the parameters are arrays, of one number for all rows
or of one for each, so that one compiled program serves them all and runs on every backend.

A row's token does not depend on the other rows, to the bit: what happens only where some row asks for it (filters,
random numbers) leaves the numbers of the others as they are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


class SamplingParams(NamedTuple):
    """`SampleSettings` on the device: each a number for all rows, or one for each row.

    The last three are None where a program does without them. Frequency and presence penalties count the tokens of the
    text, not those of the prompt.
    """

    temperature: Float[Array, "..."]
    top_k: Int[Array, "..."]
    top_p: Float[Array, "..."]
    min_p: Float[Array, "..."]
    repetition_penalty: Float[Array, "..."]
    frequency_penalty: Float[Array, "..."] | None = None
    presence_penalty: Float[Array, "..."] | None = None
    logit_bias: Float[Array, "... V"] | None = None

    @property
    def greedy(self) -> Bool[Array, "..."]:
        """Where the most likely token is taken."""
        return (self.temperature == 0) | (self.top_k == 1)


def sample_token(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    sampling: SamplingParams,
    keys: UInt32[Array, "B 2"],
    counts: Int[Array, "B V"] | None = None,
) -> tuple[Int[Array, " B"], Float[Array, "B V"]]:
    """One token for each row, sampled from the filtered logits; at temperature 0 or top-k 1 the most likely one.

    Of equally likely tokens greedy decoding takes the first. Which of the two it is, is decided on the device: where
    all rows are greedy, decoding costs no random numbers, and one program does both.

    Args:
      logits: of the next token.
      seen: tokens in the prompt and the text so far.
      sampling: for all rows, or for each.
      keys: raw PRNG keys, one for each row.
      counts: how often each token is in the text so far; needed for its two penalties only.

    Returns:
      the tokens, and the logits that they were sampled from: those of a greedy row leave one token.
    """

    def noise(x: Array) -> Array:
        return jax.vmap(lambda key: jax.random.gumbel(key, x.shape[1:], x.dtype))(keys)

    greedy = _column(sampling.greedy)
    x = penalize(logits, seen, sampling, counts)
    filtered = _filter_penalized(x, sampling)
    noisy = filtered + jax.lax.cond(jnp.all(greedy), jnp.zeros_like, noise, x)
    token = argmax(jnp.where(greedy, x, noisy))
    only = jnp.arange(x.shape[-1], dtype=jnp.int32) == token[:, None]
    return token, jnp.where(greedy, jnp.where(only, 0, -jnp.inf), filtered)


def argmax(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """`jnp.argmax` as two plain reductions: several times faster on a CPU, where XLA vectorises these and not that."""
    ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
    largest = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), ids, x.shape[-1] - 1)
    return jnp.min(largest, axis=-1)


def penalize(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    sampling: SamplingParams,
    counts: Int[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
    """The logits with their bias, and with tokens that occurred before made less likely, for penalties above 1 or 0."""
    penalty = _column(sampling.repetition_penalty)
    x = logits if sampling.logit_bias is None else logits + sampling.logit_bias
    x = jnp.where(seen, jnp.where(x > 0, x / penalty, x * penalty), x)
    if counts is not None and sampling.frequency_penalty is not None:
        x -= _column(sampling.frequency_penalty) * counts
    if counts is not None and sampling.presence_penalty is not None:
        x -= _column(sampling.presence_penalty) * (counts > 0)
    return x


def filter_logits(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    sampling: SamplingParams,
    counts: Int[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
    """Logits to sample from: -inf where a filter excludes a token. The most likely token always stays."""
    return _filter_penalized(penalize(logits, seen, sampling, counts), sampling)


def _column(x: Array) -> Array:
    """A number for all rows [] or one for each [B], to be combined with an array of rows."""
    return jnp.reshape(x, (-1, 1))


def _filter_penalized(x: Float[Array, "B V"], sampling: SamplingParams) -> Float[Array, "B V"]:
    x -= jnp.max(x, axis=-1, keepdims=True)
    scaled = x / jnp.maximum(_column(sampling.temperature), 1e-6)
    any_filter = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    any_filter = jnp.any(any_filter & (sampling.temperature > 0))  # greedy decoding needs none
    return jax.lax.cond(any_filter, _filter, lambda x, scaled, *_: scaled, x, scaled, *sampling[1:4])


def _filter(x: Float[Array, "B V"], scaled: Float[Array, "B V"], top_k: Array, top_p: Array, min_p: Array) -> Array:
    """`scaled`, where top-k, top-p and min-p keep a token; `x` is the same before temperature, at most 0."""
    top_k, top_p, min_p = _column(top_k), _column(top_p), _column(min_p)
    kept = x >= _threshold(x, jnp.ones_like(x), top_k.astype(x.dtype), top_k > 0)
    p = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf), axis=-1)
    kept &= x >= _threshold(x, p, top_p, top_p < 1)
    kept &= p >= min_p * jnp.max(p, axis=-1, keepdims=True)
    return jnp.where(kept, scaled, -jnp.inf)


def _threshold(
    x: Float[Array, "B V"], weights: Float[Array, "B V"], need: Float[Array, "_ 1"], on: Bool[Array, "_ 1"]
) -> Float[Array, "B 1"]:
    """The largest value such that the weights of all x at or above it sum to `need`; the smallest x where no value
    does, or where not `on`.

    For x at most 0. Found by bisection in 40 steps: on a CPU a sort of the vocabulary takes ten times as long.
    """

    def bisect(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(jnp.where(x >= middle, weights, 0), axis=-1, keepdims=True) >= need
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.min(jnp.where(x > -jnp.inf, x, 0), axis=-1, keepdims=True)
    found = jax.lax.fori_loop(0, jnp.where(jnp.any(on), 40, 0), bisect, (low, jnp.zeros_like(low)))[0]
    return jnp.where(on, found, low)
