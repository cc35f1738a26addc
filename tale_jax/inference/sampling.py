"""Sampling of one token: penalty, temperature and filters on its logits, as pure functions.

In this order: repetition penalty (Keskar et al. 2019), temperature, top-k, top-p (the nucleus of Holtzman et al. 2020),
min-p (Nguyen et al. 2024), each on what the ones before it kept. Everything is a reduction over the vocabulary, and the
parameters are arrays, so that one compiled program serves them all and runs on every backend.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


class SamplingParams(NamedTuple):
    """`SampleSettings` of one token, as scalars on the device."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]


def sample_token(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: SamplingParams, keys: UInt32[Array, "B 2"]
) -> Int[Array, " B"]:
    """One token for each row, sampled from the filtered logits; at temperature 0 or top-k 1 the most likely one.

    Of equally likely tokens greedy decoding takes the first. Which of the two it is, is decided on the device: greedy
    decoding costs no random numbers, and one program does both. `keys` are raw PRNG keys, one for each row.
    """

    def noisy(x: Array) -> Array:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, x.shape[1:], x.dtype))(keys)
        return filter_logits(x, seen, sampling) + noise

    def greedy(x: Array) -> Array:
        return penalize(x, seen, sampling.repetition_penalty)

    return argmax(jax.lax.cond((sampling.temperature == 0) | (sampling.top_k == 1), greedy, noisy, logits))


def argmax(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """`jnp.argmax` as two plain reductions: several times faster on a CPU, where XLA vectorises these and not that."""
    ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
    largest = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), ids, x.shape[-1] - 1)
    return jnp.min(largest, axis=-1)


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""]) -> Float[Array, "B V"]:
    """Makes tokens seen before less likely, for a penalty above 1."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: SamplingParams
) -> Float[Array, "B V"]:
    """Logits to sample from: -inf where a filter excludes a token. The most likely token always stays."""
    x = penalize(logits, seen, sampling.repetition_penalty)
    x -= jnp.max(x, axis=-1, keepdims=True)
    scaled = x / jnp.maximum(sampling.temperature, 1e-6)
    any_filter = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    return jax.lax.cond(any_filter, _filter, lambda x, scaled, sampling: scaled, x, scaled, sampling)


def _filter(x: Float[Array, "B V"], scaled: Float[Array, "B V"], sampling: SamplingParams) -> Float[Array, "B V"]:
    """`scaled`, where top-k, top-p and min-p keep a token; `x` is the same before temperature, at most 0."""
    kept = x >= _threshold(x, jnp.ones_like(x), sampling.top_k.astype(x.dtype), sampling.top_k > 0)
    p = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf), axis=-1)
    kept &= x >= _threshold(x, p, sampling.top_p, sampling.top_p < 1)
    kept &= p >= sampling.min_p * jnp.max(p, axis=-1, keepdims=True)
    return jnp.where(kept, scaled, -jnp.inf)


def _threshold(
    x: Float[Array, "B V"], weights: Float[Array, "B V"], need: Float[Array, ""], on: Bool[Array, ""]
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
    return jax.lax.fori_loop(0, jnp.where(on, 40, 0), bisect, (low, jnp.zeros_like(low)))[0]
