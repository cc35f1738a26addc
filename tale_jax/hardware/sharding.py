"""Which device holds what: the mesh, and one table from parameter names to partitions.

Axes of the mesh: `data` splits the batch; `fsdp` splits the batch and the weights (each device keeps a slice of every
matrix and of its optimizer state, and XLA gathers what a layer needs); `tensor` splits the work of a layer (its heads,
its MLP, the vocabulary), so that a device needs only its part of the weights, and sums are made together (Shoeybi et
al. 2019). Devices along `tensor` are neighbours. One device is the simplest case.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tale_jax.config import Config
from tale_jax.utils.settings import nearest_divisor

# The first pattern found in the dotted name decides. Blocks have a leading axis L. `tensor` splits the columns of
# matrices (rows, of those that end a branch) and the vocabulary, `fsdp` the other side, D. Adapters [L, in, rank] and
# [L, rank, out], and gains [L, out], follow their matrix along `tensor`, and are too small for `fsdp`.
PARTITION_RULES = (
    (r"(^|\.)embedding$", PartitionSpec("tensor", "fsdp")),
    (r"(^|\.)head$", PartitionSpec("fsdp", "tensor")),
    (r"blocks\..*(output|down)\.kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"blocks\..*\.kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"blocks\..*(output|down)\.a$", PartitionSpec(None, "tensor", None)),
    (r"blocks\..*(output|down)\.(b|gain)$", PartitionSpec()),
    (r"blocks\..*\.b$", PartitionSpec(None, None, "tensor")),
    (r"blocks\..*\.gain$", PartitionSpec(None, "tensor")),
    (r".*", PartitionSpec()),
)
BATCH_PARTITION = PartitionSpec(("data", "fsdp"))


def make_mesh(config: Config, devices: Sequence[Any]) -> Mesh:
    """The mesh over `devices`. Raises ValueError for axes that do not use them all, or do not divide a size."""
    sizes = mesh_sizes(config, len(devices))
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), tuple(sizes))


def mesh_sizes(config: Config, count: int) -> dict[str, int]:
    """How many devices each axis has, of the mesh of `count` devices. Raises ValueError as `make_mesh` does."""
    axes = config.mesh
    data = axes.data or max(1, count // (axes.fsdp * axes.tensor))
    if data * axes.fsdp * axes.tensor != count:
        tensor = f"mesh.tensor={axes.tensor} times " if axes.tensor > 1 else ""
        raise ValueError(
            f"{tensor}mesh.fsdp={axes.fsdp} times mesh.data={data} must be the number of devices, {count}; "
            f"try {_fitting_axes(config, count)}"
        )
    for name, axis, size in _split_sizes(config):
        if size % getattr(axes, axis):
            rule = f"must be divisible by mesh.{axis}={getattr(axes, axis)}"
            raise ValueError(f"{name}={size} {rule}; try {_fitting_axes(config, count)}")
    if config.micro_batch_size % (rows := data * axes.fsdp):
        sharing = f"devices, {rows}" if axes.tensor == 1 else f"parts of a batch, mesh.data times mesh.fsdp, {rows}"
        raise ValueError(
            f"micro_batch_size={config.micro_batch_size} must be divisible by the number of {sharing}; "
            f"try {_divisible_batch(config, rows)}"
        )
    return {"data": data, "fsdp": axes.fsdp, "tensor": axes.tensor}


def _split_sizes(config: Config) -> list[tuple[str, str, int]]:
    """The sizes that an axis must divide: field, axis, size."""
    model = config.model
    return [
        ("model.embed_dim", "fsdp", model.embed_dim),
        ("model.num_heads", "tensor", model.num_heads),
        ("model.num_kv_heads", "tensor", model.num_kv_heads),
        ("model.mlp_dim", "tensor", model.mlp_dim),
        ("tokenizer.vocab_size", "tensor", config.tokenizer.vocab_size),
    ]


def _fitting_axes(config: Config, count: int) -> str:
    """Flags of a mesh of `count` devices near the one asked for, whose axes divide what they split."""
    left, flags = count, "--config.mesh.data=0"
    for axis in ("tensor", "fsdp"):
        sizes = [size for _, name, size in _split_sizes(config) if name == axis]
        wanted = getattr(config.mesh, axis)
        fitting = nearest_divisor(math.gcd(left, *sizes), wanted)
        left //= fitting
        flags += f" --config.mesh.{axis}={fitting}" if axis == "fsdp" or wanted > 1 else ""
    return flags


def _divisible_batch(config: Config, count: int) -> str:
    """Flags of a batch that `count` devices divide: the batch as it is where that is possible, else no larger one."""
    micro = config.micro_batch_size // count or 1  # rows of a device
    if config.batch_size % count == 0:
        return f"--config.micro_batch_size={count * nearest_divisor(config.batch_size // count, micro)}"
    batch = count * micro * max(1, config.batch_size // (count * micro))
    return f"--config.batch_size={batch} --config.micro_batch_size={count * micro}"


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every array in a state or parameter tree, by its name; optimizer state follows its weight."""

    def sharding_of(path: tuple, leaf: Any) -> NamedSharding:
        name = ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
        spec = next(spec for pattern, spec in PARTITION_RULES if re.search(pattern, name))
        axes = [axis if axis is None or size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, leaf.shape)]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its sequences are spread over all devices but those along `tensor`, which share them."""
    return NamedSharding(mesh, BATCH_PARTITION)
