"""Each optimizer against a plain account of it, and decay by groups, schedule and sign."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import build_config

from tale_jax.inference.sampling import sample_token
from tale_jax.model.transformer import Transformer
from tale_jax.planning.autotune import SIZE
from tale_jax.training.muon import newton_schulz, scale_by_muon, scale_by_normuon
from tale_jax.training.optimizer import group_of_weights, make_optimizer

ATTENTION, MLP = ("query", "key", "value", "output"), ("gate", "up", "down")
RATE = 0.01


def shapes(**changes):
    """Dotted name → shape, and → group, of a model of width 64 with heads of 16, 3 layers and 512 ids."""
    small = {"num_layers": 3, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 128}
    config = build_config(**{f"model.{name}": value for name, value in (small | changes).items()}).model
    params = jax.eval_shape(Transformer(config, 512).init, jax.random.PRNGKey(0), jnp.zeros((1, 8), jnp.int32))[
        "params"
    ]

    def flat(tree):
        return {".".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    return {name: leaf.shape for name, leaf in flat(params).items()}, flat(group_of_weights(params))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_groups_by_name_and_shape(tied, qk_norm):
    shape, group = shapes(tie_embeddings=tied, qk_norm=qk_norm)
    matrices = {f"blocks.attention.{name}.kernel" for name in ATTENTION} | {f"blocks.mlp.{name}.kernel" for name in MLP}
    tables = {"embedding"} | (set() if tied else {"head"})
    scales = {"final_norm.scale", "blocks.attention_norm.scale", "blocks.mlp_norm.scale"}
    scales |= {f"blocks.attention.{name}_norm.scale" for name in ("query", "key")} if qk_norm else set()
    assert {name for name in group if group[name] == "matrix"} == matrices
    assert {name for name in group if group[name] == "embedding"} == tables
    assert {name for name in group if group[name] == "scale"} == scales
    assert {len(shape[name]) for name in matrices} == {3} and {shape[name][0] for name in matrices} == {3}
    assert {tuple(sorted(shape[name])) for name in tables} == {(64, 512)}
    assert all(shape[name][-1] in (64, 16) and len(shape[name]) <= 2 for name in scales)


def weights(seed: int):
    """A tree with one weight of each group, named as in a model."""
    draw = np.random.default_rng(seed).standard_normal
    tree = {
        "embedding": sample_token((6, 4)),
        "blocks": {"mlp": {"up": {"kernel": sample_token((2, 4, 8))}}, "mlp_norm": {"scale": sample_token((2, 4))}},
    }
    return jax.tree_util.tree_map(lambda x: jnp.asarray(x, jnp.float32), tree)


def settings(**changes):
    usual = {
        "name": "adamw",
        "clip_norm": 0.0,
        "learning_rate": RATE,
        "embedding_lr_multiplier": 3.0,
        "weight_decay": 0.0,
    }
    return dataclasses.replace(build_config().optimizer, **(usual | changes))


def run(config, steps: int = 3, rate=None):
    """Weights before each step, gradients, and weights at the end."""
    optimizer, params = make_optimizer(config, rate or (lambda step: RATE), head_dim=4), weights(0)
    state, before, gradients = optimizer.init(params), [], [weights(1 + step) for step in range(steps)]
    for gradient in gradients:
        before.append(params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return [*before, params], gradients


def kernel(tree):
    return np.asarray(tree["blocks"]["mlp"]["up"]["kernel"], np.float64)


def adam(weight, gradients, config, rate):
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        first = config.beta1 * first + (1 - config.beta1) * gradient
        second = config.beta2 * second + (1 - config.beta2) * gradient**2
        size = np.sqrt(second / (1 - config.beta2**step)) + config.eps
        weight = weight - rate * (first / (1 - config.beta1**step) / size + config.weight_decay * weight)
    return weight


def test_adamw():
    config = settings(weight_decay=0.5)
    path, gradients = run(config)
    np.testing.assert_allclose(kernel(path[-1]), adam(kernel(path[0]), map(kernel, gradients), config, RATE), rtol=1e-5)
    for name in ("embedding", "scale"):
        one = (lambda t: t["embedding"]) if name == "embedding" else (lambda t: t["blocks"]["mlp_norm"]["scale"])
        plain = dataclasses.replace(config, weight_decay=0.0)
        np.testing.assert_allclose(one(path[-1]), adam(one(path[0]), map(one, gradients), plain, 3 * RATE), rtol=1e-5)


def test_lion_moves_every_element_of_a_matrix_by_the_size_of_an_adam_update():
    config = settings(name="lion", weight_decay=0.5, beta1=0.9, beta2=0.99)
    path, gradients = run(config)
    weight, momentum = kernel(path[0]), 0.0
    for gradient in map(kernel, gradients):
        weight = weight - RATE * (SIZE * np.sign(0.9 * momentum + 0.1 * gradient) + 0.5 * weight)
        momentum = 0.99 * momentum + 0.01 * gradient
    np.testing.assert_allclose(kernel(path[-1]), weight, rtol=1e-5)
    np.testing.assert_allclose(path[-1]["embedding"], run(settings(beta2=0.99))[0][-1]["embedding"])  # Adam's


@pytest.mark.parametrize("warmup", [0, 2])
def test_muon_and_the_warmup_of_its_momentum(warmup):
    transform = scale_by_muon(4, momentum=0.95, warmup_steps=warmup)
    gradients = [{"kernel": kernel(weights(seed)).astype(np.float32)} for seed in range(4)]
    state, trace = transform.init(gradients[0]), 0.0
    assert len(jax.tree_util.tree_leaves(state)) == (2 if warmup else 1)  # a count only where it is needed
    for step, gradient in enumerate(gradients):
        momentum = 0.95 if step >= warmup else FIRST_MOMENTUM + (0.95 - FIRST_MOMENTUM) * step / warmup
        trace = momentum * trace + gradient["kernel"]
        updates, state = transform.update(gradient, state)
        wanted = SIZE * 8**0.5 * newton_schulz(jnp.asarray(momentum * trace + gradient["kernel"]))
        np.testing.assert_allclose(updates["kernel"], wanted, atol=0.02)
        np.testing.assert_allclose(state.momentum["kernel"], trace, rtol=1e-5)


def test_muon_takes_the_matrices_of_attention_head_by_head():
    draw = np.random.default_rng(0).standard_normal
    gradients = {
        name: {"kernel": jnp.asarray(sample_token((2, 12, 8) if name == "output" else (2, 8, 12)), jnp.float32)}
        for name in (*ATTENTION, "up")
    }
    muon = scale_by_muon(4, momentum=0.0)
    updates, _ = muon.update(gradients, muon.init(gradients))
    for name, gradient in gradients.items():
        x, y = gradient["kernel"], updates[name]["kernel"]
        for head in [slice(None)] if name == "up" else [slice(0, 4), slice(4, 8), slice(8, 12)]:
            of_head = (slice(None), head) if name == "output" else (slice(None), slice(None), head)
            wanted = x[of_head].swapaxes(1, 2) if name in ("query", "key", "value") else x[of_head]
            wanted = SIZE * wanted.shape[2] ** 0.5 * newton_schulz(wanted)
            wanted = wanted.swapaxes(1, 2) if name in ("query", "key", "value") else wanted
            np.testing.assert_allclose(y[of_head], wanted, atol=0.02)


@pytest.mark.parametrize("tall", [False, True])
def test_neurons_are_evened_out_and_matrices_keep_their_size(tall):
    """By hand, for two steps: a neuron's update over the root of the mean of its squares, then the matrix's size."""
    transform, means = scale_by_normuon(0.9), 0.0
    updates = [np.random.default_rng(seed).standard_normal((2, 4, 8)) for seed in range(2)]
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


def test_muon_with_even_neurons():
    gradients, common = {"kernel": jnp.asarray(kernel(weights(1)), jnp.float32)}, {"name": "muon", "momentum": 0.9}
    path = run(settings(**common, normuon_beta=0.95), steps=1)[0]
    muon = scale_by_muon(4, momentum=0.9)
    even = scale_by_normuon(0.95)
    updates, _ = muon.update(gradients, muon.init(gradients))
    updates, _ = even.update(updates, even.init(gradients))
    np.testing.assert_allclose(kernel(path[1]), kernel(path[0]) - RATE * updates["kernel"], atol=1e-4)


@pytest.mark.parametrize(("weight_decay", "embedding_decay"), [(0.5, 0.0), (0.0, 0.2), (0.5, 0.2)])
def test_each_group_has_its_decay_and_scales_none(weight_decay, embedding_decay):
    config = settings(weight_decay=weight_decay, embedding_decay=embedding_decay)
    optimizer, params = make_optimizer(config, lambda step: RATE, head_dim=4), weights(0)
    zero = jax.tree_util.tree_map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(kernel(updates), -RATE * weight_decay * kernel(params), rtol=1e-5)
    np.testing.assert_allclose(updates["embedding"], -3 * RATE * embedding_decay * params["embedding"], rtol=1e-5)
    np.testing.assert_array_equal(updates["blocks"]["mlp_norm"]["scale"], 0)


@pytest.mark.parametrize(("schedule", "factor"), [("rate", 0.1), ("constant", 1.0)])
def test_decay_follows_the_learning_rate_or_stays_at_its_peak(schedule, factor):
    def shrunk(strength):
        config = settings(weight_decay=strength, embedding_decay=strength, decay_schedule=schedule)
        return run(config, steps=1, rate=lambda step: 0.1 * RATE)[0]

    (before, plain), (_, decayed) = shrunk(0.0), shrunk(0.5)
    np.testing.assert_allclose(kernel(decayed) - kernel(plain), -factor * RATE * 0.5 * kernel(before), atol=1e-6)
    drop = decayed["embedding"] - plain["embedding"]
    np.testing.assert_allclose(drop, -3 * factor * RATE * 0.5 * before["embedding"], atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
@pytest.mark.parametrize("schedule", ["rate", "constant"])
def test_cautious_decay_only_where_the_step_shrinks_the_weight_too(name, schedule):
    common = {"name": name, "decay_schedule": schedule}
    before, plain = run(settings(**common), steps=1)[0]
    cautious = run(settings(**common, weight_decay=0.5, embedding_decay=0.5, cautious=True), steps=1)[0][1]
    for one, rate in ((kernel, RATE), (lambda tree: tree["embedding"], 3 * RATE)):
        smaller = (one(plain) - one(before)) * one(before) < 0
        assert 0.2 < smaller.mean() < 0.8
        wanted = one(plain) - smaller * rate * 0.5 * one(before)
        np.testing.assert_allclose(one(cautious), wanted, atol=1e-6)


def test_decay_alone_is_cautious_by_sign():
    params = {"embedding": jnp.array([1.0, -1.0, 1.0, -1.0, 2.0])}
    updates = {"embedding": jnp.array([1.0, 1.0, -1.0, -1.0, 0.0])}
    found, _ = decay({"embedding": 0.5}, cautious=True).update(updates, optax.EmptyState(), params)
    np.testing.assert_allclose(found["embedding"], [1.5, 1.0, -1.0, -1.5, 1.0])
