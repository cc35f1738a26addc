"""Averages of weights: a point in the middle of where the last steps have been, often better than the last of them.

A moving average is kept along the run (Polyak and Juditsky 1992; Izmailov et al. 2018), and `mean` joins weights that
were saved at different steps.
"""

from collections.abc import Iterable
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


def mean_of_trees(trees: Iterable[Any]) -> Any:
    """The mean of trees of weights, of which two at a time are in memory."""
    total, count = None, 0
    for tree in trees:
        total, count = tree if total is None else jax.tree_util.tree_map(jnp.add, total, tree), count + 1
    return total if count == 1 else jax.tree_util.tree_map(lambda x: x / count, total)
