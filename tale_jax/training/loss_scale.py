"""Dynamic loss scaling, which float16 needs: its smallest normal number is 6e-5, and most gradients are smaller.

The loss, and so every gradient, is multiplied by a power of two before the backward pass and divided by it after, in
float32. When a gradient overflows all the same, the step is left out and the scale halved; after a long run of good
steps it is doubled (Micikevicius et al. 2018).
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool

FIRST, MIN_SCALE, MAX_SCALE = 2.0**16, 1.0, 2.0**24
PATIENCE = 1000  # good steps before the scale is doubled


class LossScale(flax.struct.PyTreeNode):
    value: Any  # float32 scalar
    good: Any  # int32 scalar: steps without an overflow since the scale changed


def needs_scale(dtype: Any) -> bool:
    """Whether computing in `dtype` asks for a scaled loss; bfloat16 has the range of float32."""
    return jnp.dtype(dtype) == jnp.float16


def first_scale() -> LossScale:
    return LossScale(jnp.asarray(FIRST, jnp.float32), jnp.zeros((), jnp.int32))


def next_scale(scale: LossScale, finite: Bool[Array, ""]) -> LossScale:
    """The scale of the next step, given whether all gradients of this one were finite."""
    good = jnp.where(finite, scale.good + 1, 0)
    grows = good >= PATIENCE
    raised = jnp.where(grows, jnp.minimum(scale.value * 2, MAX_SCALE), scale.value)
    lowered = jnp.maximum(scale.value / 2, MIN_SCALE)
    return LossScale(jnp.where(finite, raised, lowered), jnp.where(grows, 0, good))
