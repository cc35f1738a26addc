"""Which token may follow: penalty, temperature and filters on the logits of one token, as pure functions.

In this order: repetition penalty (Keskar et al. 2019), temperature, top-k, top-p (the nucleus of Holtzman et al. 2020),
min-p (Nguyen et al. 2024), each on what the ones before it left. Everything is a reduction over the vocabulary, and the
settings are arrays, so that one compiled program serves them all and runs on every backend.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


class SamplingParams(NamedTuple):
    """The settings of the draw, as scalars on the device."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]


def sample_token(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: SamplingParams, keys: UInt32[Array, "B 2"]
) -> Int[Array, " B"]:
    """One token a row, from the logits filtered; at temperature 0 or top-k 1 the likeliest, the first of equals.

    Which of the two is decided on the device, so that greedy text costs no random numbers, and one program does both.
    """

    def noisy(x: Array) -> Array:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, x.shape[1:], x.dtype))(keys)
        return filter_logits(x, seen, sampling) + noise

    def greedy(x: Array) -> Array:
        return penalize(x, seen, sampling.repetition_penalty)

    return argmax(jax.lax.cond((sampling.temperature == 0) | (sampling.top_k == 1), greedy, noisy, logits))


def argmax(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """`argmax` in two plain reductions: on a CPU several times faster, since XLA vectorises these and not that one."""
    ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
    largest = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), ids, x.shape[-1] - 1)
    return jnp.min(largest, axis=-1)


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""]) -> Float[Array, "B V"]:
    """Makes tokens seen before less likely, for a penalty above 1."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], sampling: SamplingParams
) -> Float[Array, "B V"]:
    """Logits whose softmax is drawn from: -inf where a filter says no. The likeliest token always stays."""
    x = penalize(logits, seen, sampling.repetition_penalty)
    x -= jnp.max(x, axis=-1, keepdims=True)
    scaled = x / jnp.maximum(sampling.temperature, 1e-6)
    narrow = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    return jax.lax.cond(narrow, _filter, lambda x, scaled, sampling: scaled, x, scaled, sampling)


def _filter(x: Float[Array, "B V"], scaled: Float[Array, "B V"], sampling: SamplingParams) -> Float[Array, "B V"]:
    """`scaled`, where top-k, top-p and min-p keep a token; `x` is the same before temperature, at most 0."""
    kept = x >= _threshold(x, jnp.ones_like(x), sampling.top_k.astype(x.dtype), sampling.top_k > 0)
    p = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf), axis=-1)
    kept &= x >= _threshold(x, p, sampling.top_p, sampling.top_p < 1)
    kept &= p >= sampling.min_p * jnp.max(p, axis=-1, keepdims=True)
    return jnp.where(kept, scaled, -jnp.inf)


def _threshold(
    x: Float[Array, "B V"], weight: Float[Array, "B V"], need: Float[Array, ""], on: Bool[Array, ""]
) -> Float[Array, "B 1"]:
    """The largest value such that the x at or above it weigh `need` together; the least x if none does, or not `on`.

    For x at most 0. Found by halving, 40 times: on a CPU a sort of the vocabulary takes ten times as long.
    """

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(jnp.where(x >= middle, weight, 0), axis=-1, keepdims=True) >= need
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.min(jnp.where(x > -jnp.inf, x, 0), axis=-1, keepdims=True)
    return jax.lax.fori_loop(0, jnp.where(on, 40, 0), halve, (low, jnp.zeros_like(low)))[0]
