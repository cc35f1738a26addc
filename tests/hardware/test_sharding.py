"""Which device holds what, on eight simulated devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_config
from jax.sharding import PartitionSpec

from tale_jax.hardware.sharding import batch_sharding, make_mesh, shardings
from tale_jax.planning.programs import UntrainedTokenizer
from tale_jax.training.step import make_trainer


def mesh_of(batch_size=8, devices=8, **axes):
    config = build_config(batch_size=batch_size, **{f"mesh.{name}": value for name, value in axes.items()})
    return make_mesh(config, jax.devices()[:devices])


def test_the_data_axis_takes_the_devices_that_are_left():
    assert dict(mesh_of().shape) == {"data": 8, "fsdp": 1}
    assert dict(mesh_of(fsdp=4).shape) == {"data": 2, "fsdp": 4}
    assert dict(mesh_of(data=4, fsdp=2).shape) == {"data": 4, "fsdp": 2}
    assert list(mesh_of(fsdp=4).devices.ravel()) == jax.devices()


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"fsdp": 3},
            r"mesh.fsdp=3 times mesh.data=2 must be .* devices, 8; try --config.mesh.data=0 --config.mesh.fsdp=2",
        ),
        ({"data": 2}, r"mesh.fsdp=1 times mesh.data=2 must be the number of devices, 8"),
        (
            {"batch_size": 12},
            r"micro_batch_size=12 must be divisible by .* devices, 8; try --config.batch_size=8 ",
        ),
        (
            {"batch_size": 4},
            r"micro_batch_size=4 must be divisible by .* devices, 8; try --config.batch_size=8 ",
        ),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        mesh_of(**axes)


def test_a_batch_is_spread_over_all_devices():
    batch = jax.device_put(np.arange(16).reshape(8, 2), batch_sharding(mesh_of(fsdp=4)))
    assert [shard.data.tolist() for shard in batch.addressable_shards] == [[[2 * i, 2 * i + 1]] for i in range(8)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_matrix_and_its_moments_are_split_over_fsdp(cpu, optimizer):
    """Each of four devices holds a quarter of every matrix, and of what the optimizer keeps in its shape."""
    config = build_config(**{"optimizer.name": optimizer, "model.tie_embeddings": False}).with_total_steps()
    state = make_trainer(config, cpu, jnp.float32, UntrainedTokenizer.bos_id).abstract_state
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    placed = jax.tree_util.tree_leaves(shardings(mesh_of(fsdp=4), state))
    matrices = {
        leaf.shape for name, leaf in arrays.items() if name.endswith(("['kernel']", "['embedding']", "['head']"))
    }
    split = {
        name
        for (name, leaf), sharding in zip(arrays.items(), placed, strict=True)
        if leaf.size == 4 * math.prod(sharding.shard_shape(leaf.shape))
    }
    assert split == {name for name, leaf in arrays.items() if leaf.shape in matrices}
    assert len(split) >= 2 * len([name for name in split if name.startswith(".params")])


def test_an_axis_that_does_not_divide_stays_whole():
    tree = {"embedding": jax.ShapeDtypeStruct((6, 8), jnp.float32), "blocks": {"up": {"kernel": jnp.zeros((2, 8, 3))}}}
    found = shardings(mesh_of(fsdp=4), tree)
    assert found["embedding"].spec == PartitionSpec(None, None)
    assert found["blocks"]["up"]["kernel"].spec == PartitionSpec(None, "fsdp", None)
    tree["blocks"]["down"] = {"kernel": jnp.zeros((2, 3, 8))}
    assert shardings(mesh_of(fsdp=4), tree)["blocks"]["down"]["kernel"].spec == PartitionSpec(None, None, "fsdp")
