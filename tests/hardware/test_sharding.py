"""Which device holds what, on eight simulated devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_config
from jax.sharding import PartitionSpec

from tale_jax.hardware.sharding import batch_sharding, make_mesh, shardings
from tale_jax.model.adapters import init_adapters
from tale_jax.planning.programs import UntrainedTokenizer
from tale_jax.training.step import make_trainer


def mesh_of(batch_size=8, devices=8, num_heads=2, **axes):
    settings = {f"mesh.{name}": value for name, value in axes.items()}
    config = build_config(batch_size=batch_size, **settings, **{"model.num_heads": num_heads})
    return make_mesh(config, jax.devices()[:devices])


def test_the_data_axis_takes_the_devices_that_are_left():
    assert dict(mesh_of().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(mesh_of(fsdp=4).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(mesh_of(data=4, fsdp=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(mesh_of(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
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
        (
            {"tensor": 4},
            r"model.num_heads=2 must be divisible by mesh.tensor=4; try .*mesh.data=0 .*mesh.tensor=2 .*mesh.fsdp=1",
        ),
        (
            {"data": 3, "tensor": 2},
            r"mesh.tensor=2 times mesh.fsdp=1 times mesh.data=3 must be .* devices, 8; try .*mesh.tensor=2 ",
        ),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        mesh_of(**axes)


def test_devices_along_tensor_share_rows():
    batch = jax.device_put(np.arange(8), batch_sharding(mesh_of(fsdp=2, tensor=2)))
    assert [shard.data.tolist() for shard in batch.addressable_shards] == [[i, i + 1] for i in (0, 0, 2, 2, 4, 4, 6, 6)]


def test_a_batch_is_spread_over_all_devices():
    batch = jax.device_put(np.arange(16).reshape(8, 2), batch_sharding(mesh_of(fsdp=4)))
    assert [shard.data.tolist() for shard in batch.addressable_shards] == [[[2 * i, 2 * i + 1]] for i in range(8)]


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"tensor": 4}], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_matrix_and_its_moments_are_split(cpu, optimizer, axes):
    """Each of four devices holds a quarter of every matrix, and of what the optimizer keeps in its shape."""
    changes = {"optimizer.name": optimizer, "model.tie_embeddings": False, "model.num_heads": 4, "ema.decay": 0.9}
    config = build_config(**changes).with_total_steps()
    state = make_trainer(config, cpu, jnp.float32, UntrainedTokenizer.bos_id).abstract_state
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    placed = jax.tree_util.tree_leaves(shardings(mesh_of(num_heads=4, **axes), state))
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


@pytest.mark.parametrize("gain", [False, True])
def test_adapters_follow_their_matrix_along_tensor(cpu, gain):
    """What is added to a matrix's result lies where the result lies, so that adding it moves nothing."""
    config = build_config(**{"lora.rank": 2, "lora.dora": gain, "model.num_heads": 4})
    params = make_trainer(build_config().with_total_steps(), cpu, jnp.float32, 1).abstract_state.params
    adapters = jax.eval_shape(lambda: init_adapters(params_like(params), config.lora, jax.random.key(0)))
    found = {
        ".".join(key.key for key in path): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings(mesh_of(tensor=2), adapters))
    }
    assert found["blocks.attention.query.b"] == found["blocks.mlp.gate.b"] == PartitionSpec(None, None, "tensor")
    assert found["blocks.attention.output.a"] == found["blocks.mlp.down.a"] == PartitionSpec(None, "tensor", None)
    assert found["blocks.mlp.down.b"] == found["blocks.mlp.up.a"] == PartitionSpec()
    if gain:
        assert found["blocks.mlp.up.gain"] == PartitionSpec(None, "tensor")
        assert found["blocks.mlp.down.gain"] == PartitionSpec()


def params_like(shapes):
    return jax.tree_util.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def test_an_axis_that_does_not_divide_stays_whole():
    tree = {"embedding": jax.ShapeDtypeStruct((8, 6), jnp.float32), "blocks": {"up": {"kernel": jnp.zeros((2, 8, 3))}}}
    found = shardings(mesh_of(fsdp=4), tree)
    assert found["embedding"].spec == PartitionSpec("tensor", None)
    assert found["blocks"]["up"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    tree["blocks"]["down"] = {"kernel": jnp.zeros((2, 3, 8))}
    assert shardings(mesh_of(fsdp=4), tree)["blocks"]["down"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
