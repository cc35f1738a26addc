"""The update in three groups: matrices of the blocks, what is looked up (embedding and head), and scales of norms.

Embedding, head and norm scales learn faster and, unless told, are not decayed: at this size the embedding is a third of
the weights, and each row of it sees only the steps in which its token occurs. They take Adam. The matrices take AdamW,
Lion, or Muon, which gives every direction of an update the same length, so that rare ones (a name to be copied, say)
are learned like frequent ones. Updates of Lion and Muon are brought to the size of Adam's, so that learning rates and
decay mean the same for all three.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tale_jax.config import OptimizerConfig
from tale_jax.model.ops import product, transpose

SIZE = 0.2  # root mean square of the elements of a usual Adam update (Liu et al. 2025)
FIRST_MOMENTUM = 0.85  # of Muon, where it warms up
HEAD_SIDES = {"query": "out", "key": "out", "value": "out", "output": "in"}  # of matrices that all heads share


def groups(params: Any) -> Any:
    """The group of every weight, by its name: matrix (kernels inside blocks), embedding (and head), or scale."""

    def group(path: tuple, _: Any) -> str:
        names = [key.key for key in path]
        if names[-1] == "kernel" and "blocks" in names:
            return "matrix"
        return "scale" if names[-1] == "scale" else "embedding"

    return jax.tree_util.tree_map_with_path(group, params)


def make_optimizer(
    config: OptimizerConfig,
    rate: optax.Schedule,
    head_dim: int,
    natural: bool = False,
    dtype: Any = jnp.float32,
) -> optax.GradientTransformation:
    """Global-norm clipping, then the matrices' own update and Adam for the rest, with decoupled weight decay.

    The matrices take AdamW (Loshchilov and Hutter 2019), Muon or Lion (Chen et al. 2023). `rate` is their learning
    rate, step by step; `head_dim` is the width of heads; `natural` and `dtype` are of products, as in `model/ops.py`.
    """
    strengths = {"matrix": config.weight_decay, "embedding": config.embedding_decay, "scale": 0.0}

    def steps(direction: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
        scaled = optax.scale_by_learning_rate(lambda step: factor * rate(step))
        if config.decay_schedule == "rate":
            return optax.chain(direction, decay(strengths, config.cautious), scaled)
        return optax.chain(direction, scaled, decay(strengths, config.cautious, -factor * config.learning_rate))

    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    if config.name == "muon":
        matrix = scale_by_muon(head_dim, natural, dtype, config.momentum, config.momentum_warmup_steps)
        if config.neuron_beta:
            matrix = optax.chain(matrix, even_neurons(config.neuron_beta))
    elif config.name == "lion":
        matrix = optax.chain(optax.scale_by_lion(config.beta1, config.beta2), optax.scale(SIZE))
    else:
        matrix = adam

    def learner(params: Any) -> Any:
        return jax.tree_util.tree_map(lambda group: "matrix" if group == "matrix" else "embedding", groups(params))

    update = optax.multi_transform(
        {"matrix": steps(matrix, 1.0), "embedding": steps(adam, config.embedding_rate)}, learner
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update


def decay(strengths: dict[str, float], cautious: bool = False, scale: float = 1.0) -> optax.GradientTransformation:
    """Adds to the update of each weight `scale` times the weight times the strength of its group.

    The sign of `scale` says which way updates point: positive while they are still to be subtracted from the weights.
    `cautious` leaves alone what the update makes larger (Cautious Weight Decay, Chen et al. 2025). There is no state.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(group: str, update: Array, weight: Array) -> Array:
            if not strengths[group]:
                return update
            shrinking = scale * strengths[group] * weight
            return update + (jnp.where(update * shrinking >= 0, shrinking, 0) if cautious else shrinking)

        return jax.tree_util.tree_map(one, groups(params), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class MuonState(NamedTuple):
    momentum: Any


class WarmingMuonState(NamedTuple):
    momentum: Any
    count: Any  # updates done


def scale_by_muon(
    head_dim: int,
    natural: bool = False,
    dtype: Any = jnp.float32,
    momentum: float = 0.95,
    warmup_steps: int = 0,
) -> optax.GradientTransformation:
    """Nesterov momentum, made orthogonal (Jordan et al. 2024), of the size of an Adam update (Liu et al. 2025).

    For stacks of matrices [L, in, out]. Those of attention are taken apart into heads of `head_dim`, for each head does
    work of its own: sooner learned (0.02 nats after a quarter of a pass over WikiText-2, level after the whole), and
    less to multiply. All matrices of one shape are made orthogonal together: few large products instead of many small
    ones. Over the first `warmup_steps` updates the momentum rises linearly to `momentum`; only then does the state hold
    their count.
    """
    warming = optax.linear_schedule(min(FIRST_MOMENTUM, momentum), momentum, warmup_steps) if warmup_steps else None

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        share = warming(state.count) if warming else momentum
        moved = jax.tree_util.tree_map(lambda m, g: share * m + g, state.momentum, updates)
        ahead = jax.tree_util.tree_map(lambda m, g: share * m + g, moved, updates)
        paths, tree = jax.tree_util.tree_flatten_with_path(ahead)
        sides = [HEAD_SIDES.get(path[-2].key) if len(path) > 1 else None for path, _ in paths]
        leaves = [_apart(x, side, head_dim) for (_, x), side in zip(paths, sides, strict=True)]
        tall = [x.shape[-2] > x.shape[-1] for x in leaves]
        wide = [x.swapaxes(-1, -2) if turn else x for x, turn in zip(leaves, tall, strict=True)]
        for shape in {x.shape[-2:]: None for x in wide}:
            members = [i for i, x in enumerate(wide) if x.shape[-2:] == shape]
            stacked = orthogonal(jnp.concatenate([wide[i] for i in members]), natural, dtype)
            stacked *= SIZE * shape[1] ** 0.5
            ends = np.cumsum([wide[i].shape[0] for i in members])
            for i, x in zip(members, jnp.split(stacked, ends[:-1]), strict=True):
                leaves[i] = x.swapaxes(-1, -2) if tall[i] else x
        leaves = [_together(x, side, like.shape) for x, side, (_, like) in zip(leaves, sides, paths, strict=True)]
        state = WarmingMuonState(moved, state.count + 1) if warming else MuonState(moved)
        return jax.tree_util.tree_unflatten(tree, leaves), state

    def init(params: Any) -> Any:
        zeros = jax.tree_util.tree_map(jnp.zeros_like, params)
        return WarmingMuonState(zeros, jnp.zeros((), jnp.int32)) if warming else MuonState(zeros)

    return optax.GradientTransformation(init, update)


def _apart(x: Float[Array, "L M N"], side: str | None, head_dim: int) -> Float[Array, "_ _ _"]:
    """Matrices of all heads as matrices of one head each."""
    layers, rows, columns = x.shape
    if side == "out":
        heads = columns // head_dim
        return x.reshape(layers, rows, heads, head_dim).swapaxes(1, 2).reshape(layers * heads, rows, head_dim)
    return x.reshape(-1, head_dim, columns) if side == "in" else x


def _together(x: Float[Array, "_ _ _"], side: str | None, shape: tuple[int, ...]) -> Float[Array, "L M N"]:
    """What `_apart` took apart, of `shape` again."""
    layers, rows, _ = shape
    if side == "out":
        x = x.reshape(layers, -1, rows, x.shape[-1]).swapaxes(1, 2)
    return x.reshape(shape)


class EvenState(NamedTuple):
    means: Any  # of the squares of updates, by neuron


def even_neurons(beta: float) -> optax.GradientTransformation:
    """Gives the neurons of a matrix updates of one size, as NorMuon does after Muon (Li et al. 2025).

    For stacks of matrices [L, in, out]. A neuron is a slice across the shorter side; its update is divided by the root
    of a moving mean, of decay `beta`, of its mean square. Then each matrix is brought back to the size it had.
    """

    def squares(x: Float[Array, "L M N"]) -> Float[Array, "L _ _"]:
        return jnp.mean(jnp.square(x), axis=-2 if x.shape[-2] <= x.shape[-1] else -1, keepdims=True)

    def even(x: Float[Array, "L M N"], mean: Float[Array, "L _ _"]) -> Float[Array, "L M N"]:
        y = x * jax.lax.rsqrt(mean + 1e-12)
        before, after = (jnp.mean(jnp.square(z), axis=(-2, -1), keepdims=True) for z in (x, y))
        return y * jnp.sqrt(before / (after + 1e-12))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        means = jax.tree_util.tree_map(lambda m, x: beta * m + (1 - beta) * squares(x), state.means, updates)
        return jax.tree_util.tree_map(even, updates, means), EvenState(means)

    def init(params: Any) -> Any:
        return EvenState(jax.tree_util.tree_map(lambda x: jnp.zeros_like(squares(x)), params))

    return optax.GradientTransformation(init, update)


def orthogonal(
    x: Float[Array, "L M N"], natural: bool = False, dtype: Any = jnp.float32, steps: int = 5
) -> Float[Array, "L M N"]:
    """Nearly the orthogonal factor of each matrix (M <= N), by Newton-Schulz in `dtype`.

    All singular values end between about 0.7 and 1.2. `natural` is the layout of products, as in `model/ops.py`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315

    # At a Frobenius norm of 1 no singular value is above 1.
    y = (x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)).astype(dtype)
    for _ in range(steps):
        gram = product(y, transpose(y, natural))
        y = a * y + product(b * gram + c * product(gram, gram), y)
    return y.astype(x.dtype)
