"""Loss, schedule, optimizer, step and sharding, by their properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import build_config

from tale_jax.config import MeshConfig
from tale_jax.data.loader import split_windows
from tale_jax.hardware import backend, sharding
from tale_jax.model.attention import document_segments
from tale_jax.model.transformer import Transformer
from tale_jax.training import step
from tale_jax.training.muon import newton_schulz
from tale_jax.training.optimizer import group_of_weights, make_optimizer
from tale_jax.training.schedule import learning_rate, phases, seq_len_divisor
from tale_jax.training.state import init_state
from tale_jax.training.step import Trainer

V, BOS = 64, 1


def make_trainer(devices=1, share=0, fsdp=1, dtype=jnp.float32, donate=False, **changes) -> Trainer:
    small = {
        "optimizer.learning_rate": 1e-4,
        "optimizer.eps": 1e-4,  # where gradients vanish Adam divides by rounding noise, which no order of sums repeats
        "model.num_layers": 2,
        "model.embed_dim": 32,
        "model.num_heads": 4,
        "model.seq_len": 16,
        "batch_size": 8,
    }
    config = build_config(**(small | {"total_steps": 20, "tokenizer.vocab_size": 512} | changes)).with_total_steps(100)
    model = Transformer(config.model, V, dtype, materialize_transposes=True, remat=config.remat)
    rate = learning_rate(config.schedule, config.optimizer, config.total_steps)
    optimizer = make_optimizer(config.optimizer, rate, config.model.head_dim)
    mesh = sharding.make_mesh(MeshConfig(share, fsdp), jax.devices()[:devices], config.micro_batch_size)
    return Trainer(config, model, optimizer, rate, BOS, mesh, donate)


def batches(count: int, size: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, (size, 17), dtype=np.int32) for _ in range(count)]


def losses(trainer: Trainer, steps: int = 20) -> np.ndarray:
    state, out = trainer.init(), []
    for windows in batches(steps):
        state, metrics = trainer.step(state, trainer.place(windows))
        out.append(float(metrics["loss"]))
    return np.array(out)


def test_segments_count_documents():
    tokens = jnp.array([[5, 6, BOS, 7, 8, BOS, 9]])
    np.testing.assert_array_equal(document_segments(tokens, BOS), [[0, 0, 1, 1, 1, 2, 2]])


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_schedule_warms_up_peaks_and_ends(name):
    config = build_config(**{"schedule.name": name, "schedule.warmup_steps": 10, "schedule.final_fraction": 0.1})
    rate = learning_rate(config.schedule, config.optimizer, 100)
    peak = config.optimizer.learning_rate
    values = np.array([float(rate(step)) for step in range(101)])
    np.testing.assert_allclose(values[0], peak / 10, rtol=1e-5)
    np.testing.assert_allclose(values[9], peak, rtol=1e-5)
    np.testing.assert_allclose(values[100], 0.1 * peak, rtol=1e-4)
    assert (np.diff(values[:10]) > 0).all() and (np.diff(values[10:]) <= 1e-9).all()
    if name == "wsd":
        np.testing.assert_allclose(values[10:80], peak, rtol=1e-5)
    elif name == "linear":
        np.testing.assert_allclose(values[55], 0.55 * peak, rtol=1e-5)


def test_a_run_of_one_step_has_a_rate():
    config = build_config(total_steps=1).with_total_steps(10)
    assert float(learning_rate(config.schedule, config.optimizer, 1)(0)) == pytest.approx(
        config.optimizer.learning_rate
    )


def test_weight_decay_only_on_matrices():
    """With zero gradients, only the matrices shrink, by learning rate times decay."""
    config = build_config(**{"optimizer.weight_decay": 0.5}).optimizer
    params = make_trainer().init().params
    optimizer = make_optimizer(config, optax.constant_schedule(0.1), head_dim=8)
    zero = jax.tree_util.tree_map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    for update, param, group in zip(
        *map(jax.tree_util.tree_leaves, (updates, params, group_of_weights(params))), strict=True
    ):
        np.testing.assert_allclose(update, -0.05 * param if group == "matrix" else 0 * param, atol=1e-7)


@pytest.mark.parametrize("materialize_transposes", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 40), (1, 24, 24)])
def test_orthogonal_keeps_the_directions_and_levels_their_lengths(shape, materialize_transposes):
    x = jax.random.normal(jax.random.PRNGKey(0), shape)
    y = np.asarray(newton_schulz(x, materialize_transposes), np.float64)
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    sizes = np.einsum("lmk,lmn,lkn->lk", u, y, vt)  # of y along the singular directions of x
    assert (sizes > 0.6).all() and (sizes < 1.3).all()
    np.testing.assert_allclose(np.einsum("lmk,lk,lkn->lmn", u, sizes, vt), y, atol=0.1)


def test_muon_trains_the_matrices_and_adam_the_rest():
    trainer = make_trainer(**{"optimizer.name": "muon"})
    state, windows = trainer.init(), trainer.place(batches(1)[0])
    before = state.params["blocks"]["mlp"]["down"]["kernel"]
    state, first = trainer.step(state, windows)
    sizes = np.linalg.svd(np.asarray(state.params["blocks"]["mlp"]["down"]["kernel"] - before)[0], compute_uv=False)
    assert sizes.max() / np.median(sizes) < 2  # every direction moves alike
    for _ in range(10):
        state, last = trainer.step(state, windows)
    assert last["loss"] < first["loss"]


def test_clipping_bounds_the_step_not_the_metric():
    free, clipped = (make_trainer(**{"optimizer.clip_norm": norm}) for norm in (0.0, 1e-3))
    windows = batches(1)[0]
    norms = [float(t.step(t.init(), windows)[1]["grad_norm"]) for t in (free, clipped)]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 1e-2


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_accumulation_equals_the_large_batch(micro):
    np.testing.assert_allclose(losses(make_trainer(micro_batch_size=micro), 5), losses(make_trainer(), 5), rtol=1e-5)


@pytest.mark.parametrize(("data", "fsdp", "micro"), [(8, 1, 8), (1, 8, 8), (2, 4, 8)])
def test_eight_devices_equal_one_over_twenty_steps(data, fsdp, micro):
    sharded = losses(make_trainer(8, data, fsdp, micro_batch_size=micro))
    np.testing.assert_allclose(sharded, losses(make_trainer()), atol=1e-5)


def test_accumulation_on_a_mesh_equals_one_device():
    spread = losses(make_trainer(4, 2, 2, micro_batch_size=4), 5)
    np.testing.assert_allclose(spread, losses(make_trainer(), 5), atol=1e-5)


def test_fsdp_shares_matrices_and_their_optimizer_state():
    trainer = make_trainer(8, 1, 8)
    state = trainer.init()
    kernel = state.params["blocks"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree_util.tree_leaves(state))
    whole = sum(x.nbytes for x in jax.tree_util.tree_leaves(state))
    assert held < 0.2 * whole


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"mesh.fsdp=3 times mesh.data=2 must be the number of devices, 8"):
        sharding.make_mesh(MeshConfig(2, 3), jax.devices(), 8)
    with pytest.raises(ValueError, match="micro_batch_size=6 must be divisible by the number of devices, 8"):
        sharding.make_mesh(MeshConfig(0, 1), jax.devices(), 6)


def test_one_batch_can_be_overfitted():
    trainer = make_trainer(total_steps=150, **{"optimizer.learning_rate": 1e-2})
    state, windows = trainer.init(), trainer.place(batches(1)[0])
    for _ in range(150):
        state, metrics = trainer.step(state, windows)
    assert float(metrics["loss"]) < 0.3


def test_bfloat16_keeps_float32_weights_and_learns_alike():
    trainer = make_trainer(dtype=jnp.bfloat16)
    state = trainer.init()
    state, _ = trainer.step(state, batches(1)[0])
    assert {x.dtype for x in jax.tree_util.tree_leaves(state.params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(losses(make_trainer(dtype=jnp.bfloat16), 10), losses(make_trainer(), 10), rtol=0.02)


def test_dropout_depends_on_the_step_and_repeats():
    trainer = make_trainer(**{"model.dropout": 0.5, "model.zero_init_outputs": False})
    state, windows = trainer.init(), batches(1)[0]
    first, again = (float(trainer.step(state, windows)[1]["loss"]) for _ in range(2))
    later = float(trainer.step(state.replace(step=state.step + 1), windows)[1]["loss"])
    assert first == again != later


def test_initial_weights_are_a_function_of_the_seed():
    def weights(seed):
        config = dataclasses.replace(build_config(), seed=seed)
        return init_state(Transformer(config.model, V), optax.sgd(0.1), seed).params["embedding"]

    np.testing.assert_array_equal(weights(0), weights(0))
    assert jnp.abs(weights(0) - weights(1)).max() > 0


def test_short_windows_come_first_for_their_share_of_the_run():
    config = build_config(**{"schedule.short_seq_fraction": 0.25, "schedule.seq_len_divisor": 4})
    assert [seq_len_divisor(config.schedule, 8, step) for step in range(8)] == [4, 4, 1, 1, 1, 1, 1, 1]
    assert {seq_len_divisor(build_config().schedule, 8, step) for step in range(8)} == {1}


def test_small_batches_come_first_and_the_rate_follows_the_text():
    changes = {"schedule.small_fraction": 0.25, "schedule.small_divisor": 4, "schedule.warmup_steps": 2}
    config = build_config(**changes)
    assert [batch_parts(config.schedule, 8, at) for at in range(8)] == [4, 4, 1, 1, 1, 1, 1, 1]
    assert {batch_parts(build_config().schedule, 8, at) for at in range(8)} == {1}
    by_update = learning_rate(config.schedule, config.optimizer, 8)
    plain = dataclasses.replace(config.schedule, small_fraction=0.0)
    by_step = learning_rate(plain, config.optimizer, 8)
    rates, wanted = [float(by_update(jnp.int32(u))) for u in range(14)], [float(by_step(s)) for s in range(8)]
    np.testing.assert_allclose(rates[0:8:4] + rates[8:], wanted, rtol=1e-6)
    assert rates[:8] == sorted(rates[:8]) and len(set(rates[:5])) == 5


def test_phases_are_what_the_steps_are():
    assert phases(build_config().schedule) == [(1.0, 1, 1)]
    changes = {"schedule.short_seq_fraction": 0.5, "schedule.small_fraction": 0.125, "schedule.small_divisor": 4}
    schedule = build_config(**changes).schedule
    assert phases(schedule) == [(0.125, 2, 4), (0.375, 2, 1), (0.5, 1, 1)]
    kinds = [(seq_len_divisor(schedule, 16, at), batch_parts(schedule, 16, at)) for at in range(16)]
    assert kinds == [kind for share, *rest in phases(schedule) for kind in [tuple(rest)] * round(16 * share)]


def test_a_part_of_a_batch_is_a_batch_of_its_own():
    """With micro-batches larger than the part, as large, and smaller."""
    windows = batches(1)[0]
    direct = make_trainer(batch_size=4)
    _, wanted = direct.step(direct.init(), direct.place(windows[:4]))
    for micro in (8, 4, 2):
        trainer = make_trainer(micro_batch_size=micro, **{"schedule.small_fraction": 0.5})
        state, metrics = trainer.early_step(trainer.init(), trainer.place(windows[:4]))
        np.testing.assert_allclose(metrics["loss"], wanted["loss"], rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], wanted["grad_norm"], rtol=1e-4)
        assert int(state.step) == 1


def test_parts_that_devices_cannot_share_are_refused(cpu):
    here = dataclasses.replace(cpu, devices=tuple(jax.devices()[:4]))
    config = build_config(
        batch_size=8, **{"schedule.small_fraction": 0.5, "schedule.small_divisor": 4}
    ).with_total_steps(100)
    with pytest.raises(ValueError, match=r"schedule.small_divisor=4 must leave parts of batch_size=8 that the 4 dev"):
        step.make_trainer(config, backend, jnp.float32, BOS)


def test_shorter_windows_are_other_windows_of_the_same_tokens():
    """Both lengths take the same step function; within one document each piece knows only itself."""
    trainer = make_trainer(donate=True, **{"schedule.short_seq_fraction": 0.5})
    windows = batches(1)[0]
    pieces = split_windows(windows, 2)
    assert pieces.shape == (16, 9)
    state, short = trainer.early_step(trainer.init(), trainer.place(pieces))
    direct = make_trainer(batch_size=16, **{"model.seq_len": 8})
    _, wanted = direct.step(direct.init(), direct.place(pieces))
    np.testing.assert_allclose(short["loss"], wanted["loss"], rtol=1e-6)
    compiled = trainer.compile()
    assert trainer.step is compiled and trainer.early_step is not compiled
    state, whole = trainer.step(state, trainer.place(windows))
    assert int(state.step) == 2 and np.isfinite(whole["loss"])


def test_dropout_is_the_same_on_every_mesh():
    changes = {"model.dropout": 0.3, "model.embedding_dropout": 0.2, "model.zero_init_outputs": False}
    one = losses(make_trainer(**changes), 4)
    assert np.abs(one - losses(make_trainer(), 4)).max() > 1e-3
    np.testing.assert_allclose(losses(make_trainer(8, 2, 4, **changes), 4), one, atol=1e-5)
