"""A moving average of the weights, often better than the last (Polyak and Juditsky 1992; Izmailov et al. 2018)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def update_ema(ema_params: Any, params: Any, decay: float, step: Int[Array, ""]) -> Any:
    """The moving average after one step more, whose weights are `params`; `step` counts the steps before it.

    The decay begins at 0.1 and rises to `decay`, as min(decay, (1 + step) / (10 + step)): an early average forgets the
    weights before the first step soon, instead of after 1 / (1 - decay) steps.
    """
    weight = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree_util.tree_map(lambda a, p: a + weight * (p - a), ema_params, params)
