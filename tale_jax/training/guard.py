"""Steps that must not count: a loss or gradient that is no number, and a loss far above those before it.

Such a step is left out inside the jitted step: weights, moments and moving average stay as they were, bit for bit, and
the run goes on with the next batch. What is far is told from the last `WINDOW` losses that counted: their median, and
their median absolute deviation, which one spike does not move (Leys et al. 2013). Large runs skip spikes likewise
(PaLM, Chowdhery et al. 2022, section 5.1; OLMo 2, 2025).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

WINDOW = 64  # losses remembered
MIN_LOSSES = 32  # before any is taken for a spike: a loss that still falls fast tells little
DEVIATIONS = 12.0  # above the median, in robust standard deviations
MIN_DEVIATION = 0.02  # of the median: a loss hardly moves late in a run on easy text
NORMAL = 1.4826  # standard deviations of a normal distribution for each median absolute deviation


class Guard(flax.struct.PyTreeNode):
    """What is remembered of the steps so far."""

    losses: Any  # float32 [WINDOW]: a ring of the last losses that counted, in nats per token
    count: Any  # int32 []: losses that counted
    skipped: Any  # int32 []: steps left out


def first_guard() -> Guard:
    zero = jnp.zeros((), jnp.int32)
    return Guard(jnp.zeros(WINDOW, jnp.float32), zero, zero)


def max_loss(guard: Guard) -> Float[Array, ""]:
    """The largest loss that is no spike; infinite until `MIN_LOSSES` are known."""
    known = jnp.arange(WINDOW) < guard.count
    median = _median(guard.losses, known)
    deviation = NORMAL * _median(jnp.abs(guard.losses - median), known)
    limit = median + DEVIATIONS * jnp.maximum(deviation, MIN_DEVIATION * median)
    return jnp.where(guard.count < MIN_LOSSES, jnp.inf, limit)


def next_guard(guard: Guard, loss: Float[Array, ""], counts: Bool[Array, ""]) -> Guard:
    """What is remembered after one step more, which `counts` or was left out."""
    ring = jnp.where(counts & (jnp.arange(WINDOW) == guard.count % WINDOW), loss, guard.losses)
    return Guard(ring, guard.count + counts, guard.skipped + ~counts)


def where_counted(counts: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The tree `new` after a step that counts, `old` after one that is left out."""
    return jax.tree_util.tree_map(lambda a, b: jnp.where(counts, a, b), new, old)


def _median(x: Float[Array, " W"], known: Bool[Array, " W"]) -> Float[Array, ""]:
    """The lower median of the known elements."""
    ordered = jnp.sort(jnp.where(known, x, jnp.inf))
    middle = (jnp.sum(known) - 1) // 2
    return jnp.sum(jnp.where(jnp.arange(WINDOW) == middle, ordered, 0.0))  # inf * 0 would be NaN; a where is not
