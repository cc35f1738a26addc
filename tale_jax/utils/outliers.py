"""Numbers far above those before them, told inside a jitted function.

By median and median absolute deviation, which one outlier does not move, instead of mean and standard deviation (Leys
et al. 2013).
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

NORMAL = 1.4826  # standard deviations of a normal distribution for each median absolute deviation


class Recent(flax.struct.PyTreeNode):
    """The last numbers of a sequence."""

    values: Any  # float32 [N]: a ring
    count: Any  # int32 []: how many there were in all


def no_values(size: int) -> Recent:
    return Recent(jnp.zeros(size, jnp.float32), jnp.zeros((), jnp.int32))


def with_value(recent: Recent, value: Float[Array, ""], counts: Bool[Array, ""]) -> Recent:
    """One number more, where it `counts`."""
    size = recent.values.shape[0]
    values = jnp.where(counts & (jnp.arange(size) == recent.count % size), value, recent.values)
    return Recent(values, recent.count + counts)


def is_outlier(
    recent: Recent, value: Float[Array, ""], deviations: float, min_deviation: float, min_count: int
) -> Bool[Array, ""]:
    """Whether a number is so many robust standard deviations above the median of those before.

    A deviation is taken to be at least `min_deviation` of the median; before `min_count` numbers none is far off.
    """
    known = jnp.where(jnp.arange(recent.values.shape[0]) < recent.count, recent.values, jnp.nan)
    median = jnp.nanmedian(known)
    deviation = jnp.maximum(NORMAL * jnp.nanmedian(jnp.abs(known - median)), min_deviation * median)
    return (recent.count >= min_count) & (value > median + deviations * deviation)
