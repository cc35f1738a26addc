"""AdamW in two groups: the matrices of the blocks, and everything that is looked up or scales.

Embedding, head and norm scales learn faster and are not decayed: at this size the embedding is a third of the weights,
and each row of it sees only the steps in which its token occurs.
"""

from typing import Any

import jax
import optax

from tale_jax.config import OptimizerConfig


def groups(params: Any) -> Any:
    """The group of every weight, by its name: "matrix" for kernels inside blocks, else "embedding"."""

    def group(path: tuple, _: Any) -> str:
        names = [key.key for key in path]
        return "matrix" if "blocks" in names and names[-1] == "kernel" else "embedding"

    return jax.tree_util.tree_map_with_path(group, params)


def make_optimizer(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW (Loshchilov and Hutter 2019) for each group."""

    def adamw(factor: float, decay: float) -> optax.GradientTransformation:
        return optax.adamw(
            lambda step: factor * rate(step), b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=decay
        )

    update = optax.multi_transform(
        {"matrix": adamw(1.0, config.weight_decay), "embedding": adamw(config.embedding_rate, 0.0)}, groups
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update
