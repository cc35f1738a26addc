"""Muon (Jordan et al. 2024): momentum whose singular values are made equal, and NorMuon's equal neurons.

Every direction of an update gets the same length, so that rare ones (a name to be copied, say) are learned like
frequent ones. Updates are brought to the size of Adam's (Liu et al. 2025), so that learning rates and weight decay mean
the same for both.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tale_jax.model.layers import product, transpose

ADAM_RMS = 0.2  # root mean square of the elements of a usual Adam update (Liu et al. 2025)
# Which axis of an attention kernel [in, out] all heads share: each head's part is an own matrix to Muon.
HEAD_AXIS = {"query": "out", "key": "out", "value": "out", "output": "in"}


class MuonState(NamedTuple):
    momentum: Any


def scale_by_muon(
    head_dim: int, materialize_transposes: bool = False, dtype: Any = jnp.float32, momentum: float = 0.95
) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised by Newton-Schulz, of the size of an Adam update.

    For stacks of matrices [L, in, out]. Those of attention are split into heads of `head_dim`, for each head does work
    of its own: learned sooner (0.02 nats after a quarter of a pass over WikiText-2, level after the whole), and less to
    multiply. All matrices of one shape are orthogonalised together: few large products instead of many small ones.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        moved = jax.tree_util.tree_map(lambda m, g: momentum * m + g, state.momentum, updates)
        nesterov = jax.tree_util.tree_map(lambda m, g: momentum * m + g, moved, updates)
        paths, tree = jax.tree_util.tree_flatten_with_path(nesterov)
        axes = [HEAD_AXIS.get(path[-2].key) if len(path) > 1 else None for path, _ in paths]
        matrices = [_split_by_head(x, axis, head_dim) for (_, x), axis in zip(paths, axes, strict=True)]
        results = _orthogonalize_by_shape(matrices, materialize_transposes, dtype)
        leaves = [_join_heads(x, axis, like.shape) for x, axis, (_, like) in zip(results, axes, paths, strict=True)]
        return jax.tree_util.tree_unflatten(tree, leaves), MuonState(moved)

    def init(params: Any) -> Any:
        return MuonState(jax.tree_util.tree_map(jnp.zeros_like, params))

    return optax.GradientTransformation(init, update)


def _orthogonalize_by_shape(
    matrices: list[Float[Array, "_ _ _"]], materialize_transposes: bool, dtype: Any
) -> list[Float[Array, "_ _ _"]]:
    """Each stack orthogonalised, of ADAM_RMS; stacks of one shape (or of its transpose) in one product."""
    by_shape: dict[tuple[int, ...], dict[int, Array]] = defaultdict(dict)  # shape of a wide matrix → index → stack
    for index, x in enumerate(matrices):
        wide = x.swapaxes(-1, -2) if x.shape[-2] > x.shape[-1] else x
        by_shape[wide.shape[-2:]][index] = wide
    results = list(matrices)
    for shape, stacks in by_shape.items():
        joined = newton_schulz(jnp.concatenate(list(stacks.values())), materialize_transposes, dtype)
        joined *= ADAM_RMS * shape[1] ** 0.5
        ends = np.cumsum([x.shape[0] for x in stacks.values()])
        for index, x in zip(stacks, jnp.split(joined, ends[:-1]), strict=True):
            results[index] = x if x.shape == matrices[index].shape else x.swapaxes(-1, -2)
    return results


def newton_schulz(
    x: Float[Array, "L M N"], materialize_transposes: bool = False, dtype: Any = jnp.float32, steps: int = 5
) -> Float[Array, "L M N"]:
    """Nearly the orthogonal factor of each matrix (M <= N), by Jordan's quintic Newton-Schulz iteration in `dtype`.

    All singular values end between about 0.7 and 1.2. `materialize_transposes`: see `model/layers.py`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315

    # At a Frobenius norm of 1 no singular value is above 1.
    y = (x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)).astype(dtype)
    for _ in range(steps):
        gram = product(y, transpose(y, materialize_transposes))
        y = a * y + product(b * gram + c * product(gram, gram), y)
    return y.astype(x.dtype)


def _split_by_head(x: Float[Array, "L M N"], axis: str | None, head_dim: int) -> Float[Array, "_ _ _"]:
    """Matrices of all heads as matrices of one head each."""
    layers, rows, columns = x.shape
    if axis == "out":
        heads = columns // head_dim
        return x.reshape(layers, rows, heads, head_dim).swapaxes(1, 2).reshape(layers * heads, rows, head_dim)
    return x.reshape(-1, head_dim, columns) if axis == "in" else x


def _join_heads(x: Float[Array, "_ _ _"], axis: str | None, shape: tuple[int, ...]) -> Float[Array, "L M N"]:
    """The inverse of `_split_by_head`, to `shape`."""
    layers, rows, _ = shape
    if axis == "out":
        x = x.reshape(layers, -1, rows, x.shape[-1]).swapaxes(1, 2)
    return x.reshape(shape)


class NorMuonState(NamedTuple):
    mean_squares: Any  # moving mean of the mean square of each neuron's update


def scale_by_normuon(beta: float) -> optax.GradientTransformation:
    """Gives the neurons of a matrix updates of one size, after Muon (NorMuon, Li et al. 2025).

    For stacks of matrices [L, in, out]. A neuron is a slice across the shorter side; its update is divided by the root
    of a moving mean, of decay `beta`, of its mean square. Then each matrix is brought back to the size it had.
    """

    def mean_squares(x: Float[Array, "L M N"]) -> Float[Array, "L _ _"]:
        return jnp.mean(jnp.square(x), axis=-2 if x.shape[-2] <= x.shape[-1] else -1, keepdims=True)

    def normalize(x: Float[Array, "L M N"], mean: Float[Array, "L _ _"]) -> Float[Array, "L M N"]:
        y = x * jax.lax.rsqrt(mean + 1e-12)
        before, after = (jnp.mean(jnp.square(z), axis=(-2, -1), keepdims=True) for z in (x, y))
        return y * jnp.sqrt(before / (after + 1e-12))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        means = jax.tree_util.tree_map(
            lambda m, x: beta * m + (1 - beta) * mean_squares(x), state.mean_squares, updates
        )
        return jax.tree_util.tree_map(normalize, updates, means), NorMuonState(means)

    def init(params: Any) -> Any:
        return NorMuonState(jax.tree_util.tree_map(lambda x: jnp.zeros_like(mean_squares(x)), params))

    return optax.GradientTransformation(init, update)
