"""One step: the gradient of the mean loss of what counts, however it is computed, and an update in proportion to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    BOS,
    LIKE_SGD,
    assert_trees_close,
    assert_trees_equal,
    build_config,
    losses,
    take_steps,
    tiny_batches,
    tiny_trainer,
)

from tale_jax.data.loader import split_windows
from tale_jax.hardware import sharding
from tale_jax.model.packed import document_segments
from tale_jax.training.optimizer import group_of_weights
from tale_jax.training.step import global_norm, make_trainer


def windows_of_documents() -> np.ndarray:
    """A batch whose windows hold different numbers of BOS, none to four."""
    windows = np.where(tiny_batches(1)[0] == BOS, 5, tiny_batches(1)[0])
    for row in range(8):
        windows[row, 2 : 2 + 3 * (row % 5) : 3] = BOS
    return windows


def mean_loss(model, params, windows):
    """Nats per token over all tokens of the batch that count, by optax from all logits."""
    inputs, targets = jnp.asarray(windows[:, :-1]), windows[:, 1:]
    logits, _ = model.apply({"params": params}, inputs, segments=document_segments(inputs, BOS))
    nats = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    counted = targets != BOS
    return jnp.sum(nats * counted) / jnp.sum(counted)


def length(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree_util.tree_leaves(tree))))


def first_update(params, grads, learning_rate, eps, multiplier):
    """Adam's first one, whose means of gradients and of their squares are the gradient and its square."""

    def one(param, grad, group):
        rate = learning_rate * (multiplier if group == "embedding" else 1)
        return param - rate * grad / (jnp.abs(grad) + eps)

    return jax.tree_util.tree_map(one, params, grads, group_of_weights(params))


@pytest.mark.parametrize(("micro", "shorter"), [(8, 1), (2, 1), (1, 1), (8, 2), (2, 2)])
def test_a_step_follows_the_gradient_of_the_mean_loss(micro, shorter):
    """Of all tokens that count together: micro-batches hold different numbers of them."""
    multiplier = {"optimizer.embedding_lr_multiplier": 2.0}
    trainer = tiny_trainer(micro_batch_size=micro, **(LIKE_SGD | multiplier))
    windows = split_windows(windows_of_documents(), shorter)
    state = trainer.init()
    loss, grads = jax.jit(jax.value_and_grad(lambda p: mean_loss(trainer.model, p, windows)))(state.params)
    after, metrics = trainer.step(state, trainer.place(windows))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], length(grads), rtol=1e-5)
    rate, eps = LIKE_SGD["optimizer.learning_rate"], LIKE_SGD["optimizer.eps"]
    np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
    wanted = first_update(state.params, grads, rate, eps, 2.0)
    assert_trees_close(after.params, wanted, rtol=1e-5, atol=1e-7)
    assert (
        max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree_util.tree_leaves, (wanted, state.params)))) > 1e-3
    )
    assert int(after.step) == 1


@pytest.mark.parametrize("share", [0.1, 10.0])
def test_clipping_bounds_the_step_not_the_metric(share):
    """A gradient longer than `clip_norm` is shortened to it, another is taken as it is."""
    windows, free = tiny_batches(1)[0], tiny_trainer(**LIKE_SGD)
    state = free.init()
    grads = jax.jit(jax.grad(lambda p: mean_loss(free.model, p, windows)))(state.params)
    norm = length(grads)
    clipped = tiny_trainer(**(LIKE_SGD | {"optimizer.clip_norm": share * norm}))
    after, metrics = clipped.step(clipped.init(), clipped.place(windows))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    taken = jax.tree_util.tree_map(lambda g: min(1.0, share) * g, grads)
    wanted = first_update(state.params, taken, LIKE_SGD["optimizer.learning_rate"], LIKE_SGD["optimizer.eps"], 1.0)
    assert_trees_close(after.params, wanted, rtol=1e-5, atol=1e-7)


def test_the_norm_is_that_of_all_arrays_together():
    assert float(global_norm({"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])})) == pytest.approx(5)


@pytest.fixture(scope="module")
def steps_of_one_device():
    return take_steps(tiny_trainer(**LIKE_SGD), 5)


def assert_same_steps(trainer, wanted):
    """Losses, gradient norms and weights after five steps."""
    state, metrics = take_steps(trainer, 5)
    assert_trees_close(metrics, wanted[1], rtol=1e-5)
    assert_trees_close(state.params, wanted[0].params, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("micro", [4, 1])
def test_accumulation_equals_the_large_batch(micro, steps_of_one_device):
    assert_same_steps(tiny_trainer(micro_batch_size=micro, **LIKE_SGD), steps_of_one_device)


MESHES = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4)]


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"), [pytest.param(*m, marks=[pytest.mark.slow] * (1 in m)) for m in MESHES]
)
def test_eight_devices_equal_one(data, fsdp, tensor, steps_of_one_device):
    assert_same_steps(tiny_trainer(8, data, fsdp, tensor, **LIKE_SGD), steps_of_one_device)


def test_accumulation_on_a_mesh_equals_one_device(steps_of_one_device):
    assert_same_steps(tiny_trainer(4, 2, 2, micro_batch_size=4, **LIKE_SGD), steps_of_one_device)


@pytest.mark.parametrize("axes", [pytest.param((2, 4, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_muon_on_shared_matrices_equals_muon_on_whole_ones(axes):
    """With a moving average, queries that share keys, and a head of its own, too."""
    muon = {"optimizer.name": "muon", "optimizer.normuon_beta": 0.9, "ema.decay": 0.9}
    muon |= {"model.num_kv_heads": 2, "model.tie_embeddings": False}
    (state, found), (wanted_state, wanted) = (
        take_steps(t, 5) for t in (tiny_trainer(8, *axes, **muon), tiny_trainer(**muon))
    )
    assert_trees_close(state.ema_params, wanted_state.ema_params, rtol=1e-4, atol=1e-5)
    assert_trees_close(found, wanted, rtol=1e-4)
    assert_trees_close(state.params, wanted_state.params, rtol=1e-4, atol=1e-5)


def test_fsdp_shares_matrices_and_their_optimizer_state():
    trainer = tiny_trainer(8, 1, 8)
    state = trainer.init()
    kernel = state.params["blocks"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree_util.tree_leaves(state))
    whole = sum(x.nbytes for x in jax.tree_util.tree_leaves(state))
    assert held < 0.2 * whole


@pytest.mark.parametrize("place", ["place", "place_same"])
def test_a_batch_is_spread_over_all_devices(place):
    trainer, windows = tiny_trainer(8, 2, 4), tiny_batches(1)[0]
    placed = getattr(trainer, place)(windows)
    np.testing.assert_array_equal(placed, windows)
    assert [shard.data.shape for shard in placed.addressable_shards] == [(1, 17)] * 8


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"mesh.fsdp=3 times mesh.data=2 must be the number of devices, 8"):
        sharding.make_mesh(build_config(batch_size=8, **{"mesh.data": 2, "mesh.fsdp": 3}), jax.devices())
    with pytest.raises(ValueError, match="micro_batch_size=6 must be divisible by the number of devices, 8"):
        sharding.make_mesh(build_config(batch_size=6), jax.devices())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_batch_can_be_overfitted(name):
    trainer = tiny_trainer(total_steps=150, donate=True, **{"optimizer.name": name, "optimizer.learning_rate": 1e-2})
    state, windows = trainer.init(), trainer.place(tiny_batches(1)[0])
    for _ in range(150):
        state, metrics = trainer.step(state, windows)
    assert float(metrics["loss"]) < 0.3


def test_bfloat16_keeps_float32_weights_and_learns_alike():
    state, narrow = take_steps(tiny_trainer(dtype=jnp.bfloat16, **LIKE_SGD), 10)
    assert {x.dtype for x in jax.tree_util.tree_leaves(state.params)} == {jnp.dtype("float32")}
    _, wide = take_steps(tiny_trainer(**LIKE_SGD), 10)
    np.testing.assert_allclose(narrow["loss"], wide["loss"], rtol=0.01)
    np.testing.assert_allclose(narrow["grad_norm"], wide["grad_norm"], rtol=0.03)


# Dropout.

NOISY = {"model.dropout": 0.3, "model.embedding_dropout": 0.2, "model.zero_init_outputs": False}


def test_dropout_depends_on_the_step_and_repeats():
    trainer = tiny_trainer(**NOISY)
    state, windows = trainer.init(), trainer.place(tiny_batches(1)[0])
    first, again = (float(trainer.step(state, windows)[1]["loss"]) for _ in range(2))
    later = float(trainer.step(state.replace(step=state.step + 1), windows)[1]["loss"])
    assert first == again != later


@pytest.mark.slow
def test_dropout_is_the_same_on_every_mesh():
    one = losses(tiny_trainer(**NOISY), 4)
    assert np.abs(one - losses(tiny_trainer(), 4)).max() > 1e-3
    np.testing.assert_allclose(losses(tiny_trainer(8, 2, 4, **NOISY), 4), one, atol=1e-5)


@pytest.mark.parametrize("setting", ["model.dropout", pytest.param("model.embedding_dropout", marks=pytest.mark.slow)])
def test_each_micro_batch_drops_something_else(setting):
    """The mean loss of one window eight times over scatters less than that of the window alone."""
    changes = {setting: 0.5, "model.zero_init_outputs": False, "micro_batch_size": 1, "optimizer.learning_rate": 1e-9}

    def scatter(size):
        trainer = tiny_trainer(batch_size=size, **changes)
        windows = trainer.place(np.repeat(tiny_batches(1)[0][:1], size, axis=0))
        state, found = trainer.init(), []
        for _ in range(40):
            state, metrics = trainer.step(state, windows)
            found.append(float(metrics["loss"]))
        return np.std(found)

    assert scatter(8) < 0.6 * scatter(1)  # 0.35 of it where all eight are independent


# Shorter windows, and the compiled step.


def test_shorter_windows_are_other_windows_of_the_same_tokens():
    """Both lengths take the same step function; within one document each window knows only itself."""
    trainer = tiny_trainer(**LIKE_SGD)
    shorter = split_windows(tiny_batches(1)[0], 2)
    assert shorter.shape == (16, 9)
    after, metrics = trainer.step(trainer.init(), trainer.place(shorter))
    direct = tiny_trainer(batch_size=16, **(LIKE_SGD | {"model.seq_len": 8}))
    wanted, wanted_metrics = direct.step(direct.init(), direct.place(shorter))
    assert_trees_close(metrics, wanted_metrics, rtol=1e-6)
    assert_trees_close(after.params, wanted.params, rtol=1e-6, atol=1e-8)


def test_a_compiled_step_is_taken_for_whole_windows_only(monkeypatch):
    trainer, whole = tiny_trainer(), tiny_batches(1)[0]
    shorter, state = split_windows(whole, 2), trainer.init()
    before = [trainer.step(state, trainer.place(windows)) for windows in (whole, shorter)]
    trainer.compile()
    after = [trainer.step(state, trainer.place(windows)) for windows in (whole, shorter)]
    assert_trees_equal(after, before)
    jitted, taken = trainer.jitted_step, []
    monkeypatch.setattr(
        trainer, "jitted_step", lambda state, windows: [taken.append(windows.shape), jitted(state, windows)][1]
    )
    for windows in (whole, shorter):
        trainer.step(state, trainer.place(windows))
    assert taken == [(16, 9)]


def test_a_step_does_not_work_ahead_of_its_gradients(cpu):
    """The compiled step keeps between its passes what was saved, not what the backward pass makes of it."""
    if not cpu.materialize_transposes:
        pytest.skip("XLA before jaxlib 0.11 plans memory otherwise")
    config = build_config(**{"model.num_layers": 4, "model.embed_dim": 128, "model.seq_len": 128, "batch_size": 8})
    trainer = make_trainer(config.with_total_steps(), cpu, jnp.bfloat16, bos_id=1)
    rows, layers, width, inner = 8 * 128, 4, 128, 384
    saved = 2 * rows * layers * (8 * width + 3 * inner)  # bytes: branches' inputs, query, key, value, mixed, MLP
    state = sum(x.size * 4 for x in jax.tree_util.tree_leaves(trainer.abstract_state.params))
    assert trainer.compile().memory_analysis().temp_size_in_bytes < 1.5 * saved + 3 * state


def test_a_trainer_computes_as_its_config_and_backend_say(cpu):
    config = build_config(remat="block", **{"ema.decay": 0.9}).with_total_steps()
    for materialize_transposes in (True, False):
        backend = dataclasses.replace(cpu, materialize_transposes=materialize_transposes)
        trainer = make_trainer(config, backend, jnp.bfloat16, BOS)
        assert (trainer.model.remat, trainer.model.dtype) == ("block", jnp.bfloat16)
        assert trainer.model.materialize_transposes is materialize_transposes
        assert trainer.abstract_state.ema_params is not None
