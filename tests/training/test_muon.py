"""Muon and NorMuon by hand: directions stay, singular values and neurons are made equal, sizes are Adam's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_batches, tiny_trainer

from tale_jax.training.muon import ADAM_RMS, newton_schulz, scale_by_muon, scale_by_normuon

ATTENTION = ("query", "key", "value", "output")


@pytest.mark.parametrize("materialize_transposes", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 40), (1, 24, 24)])
def test_newton_schulz_keeps_the_directions_and_equalizes_their_lengths(shape, materialize_transposes):
    x = jax.random.normal(jax.random.PRNGKey(0), shape)
    y = np.asarray(newton_schulz(x, materialize_transposes), np.float64)
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    sizes = np.einsum("lmk,lmn,lkn->lk", u, y, vt)  # of y along the singular directions of x
    assert (sizes > 0.6).all() and (sizes < 1.3).all()
    np.testing.assert_allclose(np.einsum("lmk,lk,lkn->lmn", u, sizes, vt), y, atol=0.1)


def test_newton_schulz_is_jordans_quintic_on_each_singular_value():
    """Five times a s + b s^3 + c s^5, from s over the Frobenius norm."""
    s = np.array([3.0, 1.0, 0.1, 0.01])
    found = newton_schulz(jnp.asarray(np.diag(s), jnp.float32)[None])[0]
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    np.testing.assert_allclose(np.diag(found), s, rtol=1e-3)


def draw(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 8, 4)])
def test_muon_is_nesterov_momentum_orthogonalized_to_the_size_of_adam(shape):
    transform = scale_by_muon(4, momentum=0.95)
    state, trace = transform.init({"kernel": jnp.zeros(shape)}), 0.0
    for seed in range(4):
        gradient = draw(seed, shape)
        trace = 0.95 * trace + gradient
        updates, state = transform.update({"kernel": jnp.asarray(gradient)}, state)
        nesterov = jnp.asarray(0.95 * trace + gradient)
        wide = nesterov if shape[1] < shape[2] else nesterov.swapaxes(1, 2)
        wanted = ADAM_RMS * 8**0.5 * newton_schulz(wide)
        wanted = wanted if shape[1] < shape[2] else wanted.swapaxes(1, 2)
        np.testing.assert_allclose(updates["kernel"], wanted, atol=1e-5)
        np.testing.assert_allclose(state.momentum["kernel"], trace, rtol=1e-5)
        rms = np.sqrt(np.mean(np.square(updates["kernel"])))
        assert 0.7 * ADAM_RMS < rms < 1.2 * ADAM_RMS


def test_muon_takes_the_matrices_of_attention_head_by_head():
    gradients = {
        name: {"kernel": jnp.asarray(draw(seed, (2, 12, 8) if name == "output" else (2, 8, 12)))}
        for seed, name in enumerate((*ATTENTION, "up"))
    }
    muon = scale_by_muon(4, momentum=0.0)
    updates, _ = muon.update(gradients, muon.init(gradients))
    for name, gradient in gradients.items():
        x, y = gradient["kernel"], updates[name]["kernel"]
        for head in [slice(None)] if name == "up" else [slice(0, 4), slice(4, 8), slice(8, 12)]:
            of_head = (slice(None), head) if name == "output" else (slice(None), slice(None), head)
            wanted = x[of_head].swapaxes(1, 2) if name in ("query", "key", "value") else x[of_head]
            wanted = ADAM_RMS * wanted.shape[2] ** 0.5 * newton_schulz(wanted)
            wanted = wanted.swapaxes(1, 2) if name in ("query", "key", "value") else wanted
            np.testing.assert_allclose(y[of_head], wanted, atol=1e-5)


@pytest.mark.parametrize("tall", [False, True])
def test_normuon_gives_neurons_one_size_and_matrices_keep_theirs(tall):
    """By hand, for two steps: a neuron's update over the root of the mean of its squares, then the matrix's size."""
    transform, means = scale_by_normuon(0.9), 0.0
    updates = [draw(seed, (2, 4, 8)).astype(np.float64) for seed in range(2)]
    updates = [(x * np.arange(1, 9)).swapaxes(1, 2 if tall else 1) for x in updates]
    neurons = 2 if tall else 1  # the axis that a neuron's mean runs along
    state = transform.init({"kernel": jnp.zeros_like(updates[0], jnp.float32)})
    for update in updates:
        means = 0.9 * means + 0.1 * (update**2).mean(neurons, keepdims=True)
        wanted = update / np.sqrt(means)
        wanted *= np.sqrt((update**2).mean((1, 2), keepdims=True) / (wanted**2).mean((1, 2), keepdims=True))
        found, state = transform.update({"kernel": jnp.asarray(update, jnp.float32)}, state)
        np.testing.assert_allclose(found["kernel"], wanted, rtol=1e-4)
        sizes = [(np.asarray(x) ** 2).mean(neurons) for x in (found["kernel"], update)]
        spread, before = (x.max() / x.min() for x in sizes)
        assert spread < before / 3


def test_muon_moves_every_direction_of_a_matrix_alike():
    trainer = tiny_trainer(**{"optimizer.name": "muon"})
    state, windows = trainer.init(), trainer.place(tiny_batches(1)[0])
    before = state.params["blocks"]["mlp"]["down"]["kernel"]
    state, first = trainer.step(state, windows)
    sizes = np.linalg.svd(np.asarray(state.params["blocks"]["mlp"]["down"]["kernel"] - before)[0], compute_uv=False)
    assert sizes.max() / np.median(sizes) < 2
    for _ in range(10):
        state, last = trainer.step(state, windows)
    assert last["loss"] < first["loss"]
