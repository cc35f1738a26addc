"""The update in three groups: matrices of the blocks, embedding tables (embedding and head), and scales of norms.

Embedding, head and norm scales have a higher learning rate and no weight decay: at this size the embedding is a third
of the weights, and each row of it sees only the steps in which its token occurs. They take Adam. The matrices take the
optimizer that the config names.

A new optimizer is one function and one entry in `OPTIMIZERS`, and its name in `OPTIMIZERS` of `config.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tale_jax.config import OptimizerConfig
from tale_jax.training.muon import scale_by_muon, scale_by_normuon


class MatrixShape(NamedTuple):
    """What an optimizer may need to know of the matrices: the width of heads, and how products are computed."""

    head_dim: int
    materialize_transposes: bool = False
    dtype: Any = jnp.float32


def adamw(config: OptimizerConfig, shape: MatrixShape | None = None) -> optax.GradientTransformation:
    """Adam's direction (Kingma and Ba 2015); with the decoupled weight decay added later it is AdamW."""
    del shape
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


def muon(config: OptimizerConfig, shape: MatrixShape) -> optax.GradientTransformation:
    """Muon, and NorMuon where `normuon_beta` is above 0."""
    direction = scale_by_muon(*shape, momentum=config.momentum)
    return optax.chain(direction, scale_by_normuon(config.normuon_beta)) if config.normuon_beta else direction


# Name → the direction of the update of the matrices, stacks [L, in, out], of about the size of Adam's.
OPTIMIZERS: dict[str, Callable[[OptimizerConfig, MatrixShape], optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
}


def group_of_weights(params: Any) -> Any:
    """The group of every weight, by its name: "matrix" (in blocks, kernels and adapters) or "embedding" (all else)."""

    def group(path: tuple, _: Any) -> str:
        names = [key.key for key in path]
        return "matrix" if names[-1] in ("kernel", "a", "b") and "blocks" in names else "embedding"

    return jax.tree_util.tree_map_with_path(group, params)


def make_optimizer(
    config: OptimizerConfig, learning_rate: optax.Schedule, shape: MatrixShape
) -> optax.GradientTransformation:
    """Clipping by global norm, then the matrices' own update with decoupled weight decay, and Adam for the rest.

    `learning_rate` is that of the matrices, step by step; weight decay is times it (Loshchilov and Hutter 2019).
    """
    matrix = optax.chain(
        OPTIMIZERS[config.name](config, shape),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    embedding = optax.chain(
        adamw(config),
        optax.scale_by_learning_rate(lambda step: config.embedding_lr_multiplier * learning_rate(step)),
    )
    update = optax.multi_transform({"matrix": matrix, "embedding": embedding}, group_of_weights)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update
