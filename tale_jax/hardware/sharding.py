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

from tale_jax.config import MeshConfig

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


def make_mesh(config: MeshConfig, devices: Sequence[Any], batch_size: int) -> Mesh:
    """The mesh over `devices`. Raises ValueError when its axes do not use them all or do not divide the micro-batch."""
    count = len(devices)
    data = config.data or max(1, count // config.fsdp)
    if data * config.fsdp != count:
        raise ValueError(
            f"mesh.fsdp={config.fsdp} times mesh.data={data} must be the number of devices, {count}; "
            f"try mesh.data=0 with an mesh.fsdp that divides {count}"
        )
    if batch_size % count:
        raise ValueError(
            f"micro_batch_size={batch_size} must be divisible by the number of devices, {count}; "
            f"try {max(1, batch_size // count) * count}"
        )
    return Mesh(np.asarray(devices).reshape(data, config.fsdp), ("data", "fsdp"))


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
