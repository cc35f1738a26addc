"""The update in two groups: the matrices of the blocks, and everything that is looked up or scales.

Embedding, head and norm scales learn faster and are not decayed: at this size the embedding is a third of the weights,
and each row of it sees only the steps in which its token occurs. The matrices take AdamW, or Muon, which gives every
direction of an update the same length, so that rare ones (a name to be copied, say) are learned like frequent ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tale_jax.config import OptimizerConfig
from tale_jax.model.ops import product, transpose


def groups(params: Any) -> Any:
    """The group of every weight, by its name: "matrix" for kernels inside blocks, else "embedding"."""

    def group(path: tuple, _: Any) -> str:
        names = [key.key for key in path]
        return "matrix" if "blocks" in names and names[-1] == "kernel" else "embedding"

    return jax.tree_util.tree_map_with_path(group, params)


def make_optimizer(
    config: OptimizerConfig, rate: optax.Schedule, natural: bool = False
) -> optax.GradientTransformation:
    """Global-norm clipping, then for the matrices AdamW (Loshchilov and Hutter 2019) or Muon, for the rest Adam.

    `natural` is the layout of products, as in `model/ops.py`.
    """

    def decayed(direction: optax.GradientTransformation, factor: float, decay: float) -> optax.GradientTransformation:
        steps = optax.scale_by_learning_rate(lambda step: factor * rate(step))
        return optax.chain(direction, optax.add_decayed_weights(decay), steps)

    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    matrix = adam if config.name == "adamw" else scale_by_muon(natural)
    update = optax.multi_transform(
        {"matrix": decayed(matrix, 1.0, config.weight_decay), "embedding": decayed(adam, config.embedding_rate, 0.0)},
        groups,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update


class MuonState(NamedTuple):
    momentum: Any


def scale_by_muon(natural: bool = False, momentum: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum, made orthogonal (Jordan et al. 2024), of the size of an Adam update (Liu et al. 2025).

    For stacks of matrices [L, in, out]; with 0.2 sqrt(max(in, out)) in front, learning rate and decay mean what they do
    for AdamW. All matrices of one shape are made orthogonal together: few large products instead of many small ones.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        moved = jax.tree_util.tree_map(lambda m, g: momentum * m + g, state.momentum, updates)
        ahead = jax.tree_util.tree_map(lambda m, g: momentum * m + g, moved, updates)
        leaves, tree = jax.tree_util.tree_flatten(ahead)
        tall = [x.shape[-2] > x.shape[-1] for x in leaves]
        wide = [x.swapaxes(-1, -2) if turn else x for x, turn in zip(leaves, tall, strict=True)]
        for shape in {x.shape[-2:]: None for x in wide}:
            members = [i for i, x in enumerate(wide) if x.shape[-2:] == shape]
            stacked = 0.2 * shape[1] ** 0.5 * orthogonal(jnp.concatenate([wide[i] for i in members]), natural)
            ends = np.cumsum([wide[i].shape[0] for i in members])
            for i, x in zip(members, jnp.split(stacked, ends[:-1]), strict=True):
                leaves[i] = x.swapaxes(-1, -2) if tall[i] else x
        return jax.tree_util.tree_unflatten(tree, leaves), MuonState(moved)

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree_util.tree_map(jnp.zeros_like, params))

    return optax.GradientTransformation(init, update)


def orthogonal(x: Float[Array, "L M N"], natural: bool = False, steps: int = 5) -> Float[Array, "L M N"]:
    """Nearly the orthogonal factor of each matrix (M <= N), by Newton-Schulz in bfloat16.

    All singular values end between about 0.7 and 1.2. `natural` is the layout of products, as in `model/ops.py`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315

    # At a Frobenius norm of 1 no singular value is above 1.
    y = (x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)).astype(jnp.bfloat16)
    for _ in range(steps):
        gram = product(y, transpose(y, natural))
        y = a * y + product(b * gram + c * product(gram, gram), y)
    return y.astype(x.dtype)
