"""Which device holds what: the mesh, and one table from parameter names to partitions.

Axes of the mesh: `data` splits the batch; `fsdp` splits the batch and the weights (each device keeps a slice of every
matrix and of its optimizer state, and XLA gathers what a layer needs). One device is the simplest case.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tale_jax.config import Config
from tale_jax.utils.settings import nearest_divisor

# The first pattern found in the dotted name decides. Blocks have a leading axis L. The embedding is split along V,
# kernels and a head of its own along D.
PARTITION_RULES = (
    (r"(^|\.)embedding$", PartitionSpec("fsdp", None)),
    (r"blocks\..*(output|down)\.kernel$", PartitionSpec(None, None, "fsdp")),
    (r"blocks\..*\.kernel$", PartitionSpec(None, "fsdp", None)),
    (r"(^|\.)head$", PartitionSpec("fsdp", None)),
    (r".*", PartitionSpec()),
)
BATCH_PARTITION = PartitionSpec(("data", "fsdp"))


def make_mesh(config: Config, devices: Sequence[Any]) -> Mesh:
    """The mesh over `devices`. Raises ValueError when its axes do not use them all or do not divide the micro-batch."""
    count, axes = len(devices), config.mesh
    data = axes.data or max(1, count // axes.fsdp)
    if data * axes.fsdp != count:
        raise ValueError(
            f"mesh.fsdp={axes.fsdp} times mesh.data={data} must be the number of devices, {count}; "
            f"try --config.mesh.data=0 --config.mesh.fsdp={nearest_divisor(count, axes.fsdp)}"
        )
    if config.micro_batch_size % count:
        raise ValueError(
            f"micro_batch_size={config.micro_batch_size} must be divisible by the number of devices, {count}; "
            f"try {_divisible_batch(config, count)}"
        )
    return Mesh(np.asarray(devices).reshape(data, axes.fsdp), ("data", "fsdp"))


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
    """The sharding of a batch: its sequences are spread over all devices."""
    return NamedSharding(mesh, BATCH_PARTITION)
