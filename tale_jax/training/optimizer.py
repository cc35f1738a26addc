"""The update in two groups: the matrices of the blocks, and everything that is looked up or scales.

Embedding, head and norm scales learn faster and are not decayed: at this size the embedding is a third of the weights,
and each row of it sees only the steps in which its token occurs. The matrices take AdamW, or Muon, which gives every
direction of an update the same length, so that rare ones (a name to be copied, say) are learned like frequent ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tale_jax.config import OptimizerConfig


def groups(params: Any) -> Any:
    """The group of every weight, by its name: "matrix" for kernels inside blocks, else "embedding"."""

    def group(path: tuple, _: Any) -> str:
        names = [key.key for key in path]
        return "matrix" if "blocks" in names and names[-1] == "kernel" else "embedding"

    return jax.tree_util.tree_map_with_path(group, params)


def make_optimizer(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Global-norm clipping, then for the matrices AdamW (Loshchilov and Hutter 2019) or Muon, for the rest Adam."""

    def decayed(direction: optax.GradientTransformation, factor: float, decay: float) -> optax.GradientTransformation:
        steps = optax.scale_by_learning_rate(lambda step: factor * rate(step))
        return optax.chain(direction, optax.add_decayed_weights(decay), steps)

    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    matrix = adam if config.name == "adamw" else scale_by_muon()
    update = optax.multi_transform(
        {"matrix": decayed(matrix, 1.0, config.weight_decay), "embedding": decayed(adam, config.embedding_rate, 0.0)},
        groups,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update


class MuonState(NamedTuple):
    momentum: Any


def scale_by_muon(momentum: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum, made orthogonal (Jordan et al. 2024), of the size of an Adam update (Liu et al. 2025).

    For stacks of matrices [L, in, out]; with 0.2 sqrt(max(in, out)) in front, learning rate and decay mean what they do
    for AdamW.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        moved = jax.tree_util.tree_map(lambda m, g: momentum * m + g, state.momentum, updates)
        ahead = jax.tree_util.tree_map(lambda m, g: momentum * m + g, moved, updates)
        return jax.tree_util.tree_map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * orthogonal(x), ahead), MuonState(moved)

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree_util.tree_map(jnp.zeros_like, params))

    return optax.GradientTransformation(init, update)


def orthogonal(x: Float[Array, "L M N"], steps: int = 5) -> Float[Array, "L M N"]:
    """Nearly the orthogonal factor of each matrix, by Newton-Schulz: all singular values between about 0.7 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.shape[-2] <= x.shape[-1]
    y = x if wide else x.swapaxes(-1, -2)
    y = (y / (jnp.linalg.norm(y, axis=(-2, -1), keepdims=True) + 1e-7)).astype(jnp.bfloat16)
    for _ in range(steps):
        gram = y @ y.swapaxes(-1, -2)
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y if wide else y.swapaxes(-1, -2)).astype(x.dtype)
