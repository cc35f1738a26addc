"""Each group of weights against a plain account of its update."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import build_config

from tale_jax import config as config_module
from tale_jax.model.transformer import Transformer
from tale_jax.training.muon import scale_by_muon, scale_by_normuon
from tale_jax.training.optimizer import OPTIMIZERS, MatrixShape, group_of_weights, make_optimizer

MATRICES = {f"blocks.attention.{name}.kernel" for name in ("query", "key", "value", "output")}
MATRICES |= {f"blocks.mlp.{name}.kernel" for name in ("gate", "up", "down")}
RATE, SHAPE = 0.01, MatrixShape(head_dim=4)


def test_every_optimizer_that_a_config_may_name_is_there():
    assert tuple(OPTIMIZERS) == config_module.OPTIMIZERS


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_groups_by_name(tied, qk_norm):
    """Kernels of the blocks are matrices; embedding, head and the scales of norms are all else."""
    config = build_config(**{"model.tie_embeddings": tied, "model.qk_norm": qk_norm}).model
    params = jax.eval_shape(Transformer(config, 512).init, jax.random.PRNGKey(0), jnp.zeros((1, 8), jnp.int32))
    groups = {
        ".".join(key.key for key in path): group
        for path, group in jax.tree_util.tree_leaves_with_path(group_of_weights(params["params"]))
    }
    assert {name for name, group in groups.items() if group == "matrix"} == MATRICES
    scales = {"final_norm.scale", "blocks.attention_norm.scale", "blocks.mlp_norm.scale"}
    scales |= {f"blocks.attention.{name}_norm.scale" for name in ("query", "key")} if qk_norm else set()
    tables = {"embedding"} | (set() if tied else {"head"})
    assert {name for name, group in groups.items() if group == "embedding"} == tables | scales


def weights(seed: int):
    """A tree with a matrix, a table and a scale, named as in a model."""
    draw = np.random.default_rng(seed).standard_normal
    tree = {
        "embedding": draw((6, 4)),
        "blocks": {"mlp": {"up": {"kernel": draw((2, 4, 8))}}, "mlp_norm": {"scale": draw((2, 4))}},
    }
    return jax.tree_util.tree_map(lambda x: jnp.asarray(x, jnp.float32), tree)


def settings(**changes):
    usual = {"name": "adamw", "clip_norm": 0.0, "embedding_lr_multiplier": 3.0, "weight_decay": 0.0}
    return dataclasses.replace(build_config().optimizer, **(usual | changes))


def path_of(config, steps: int = 3, rate=lambda step: RATE):
    """Weights before each step and after the last, and the gradients."""
    optimizer, path, gradients = make_optimizer(config, rate, SHAPE), [weights(0)], []
    state = optimizer.init(path[0])
    for step in range(steps):
        gradients.append(weights(1 + step))
        updates, state = optimizer.update(gradients[-1], state, path[-1])
        path.append(optax.apply_updates(path[-1], updates))
    return path, gradients


def kernel(tree):
    return np.asarray(tree["blocks"]["mlp"]["up"]["kernel"], np.float64)


def embedding(tree):
    return np.asarray(tree["embedding"], np.float64)


def norm_scale(tree):
    return np.asarray(tree["blocks"]["mlp_norm"]["scale"], np.float64)


def adam(weight, gradients, config, rates, weight_decay):
    """Kingma and Ba's algorithm, and decoupled weight decay."""
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        first = config.beta1 * first + (1 - config.beta1) * gradient
        second = config.beta2 * second + (1 - config.beta2) * gradient**2
        size = np.sqrt(second / (1 - config.beta2**step)) + config.eps
        weight = weight - rate * (first / (1 - config.beta1**step) / size + weight_decay * weight)
    return weight


def test_adamw_decays_matrices_only_and_multiplies_the_rate_of_all_else():
    config = settings(weight_decay=0.5, beta1=0.8, beta2=0.9, eps=1e-3)
    rates = [RATE, 2 * RATE, 3 * RATE]
    path, gradients = path_of(config, 3, lambda step: RATE * (step + 1))
    for part, factor, decay in ((kernel, 1, 0.5), (embedding, 3, 0.0), (norm_scale, 3, 0.0)):
        wanted = adam(part(path[0]), map(part, gradients), config, [factor * rate for rate in rates], decay)
        np.testing.assert_allclose(part(path[-1]), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_zero_gradients_matrices_shrink_and_nothing_else_moves(name):
    config, params = settings(name=name, weight_decay=0.5), weights(0)
    optimizer = make_optimizer(config, lambda step: RATE, SHAPE)
    zero = jax.tree_util.tree_map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(kernel(updates), -RATE * 0.5 * kernel(params), rtol=1e-5)
    assert not embedding(updates).any() and not norm_scale(updates).any()


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_muon_moves_the_matrices_and_adam_the_rest(beta):
    config = settings(name="muon", momentum=0.8, normuon_beta=beta, weight_decay=0.5)
    path, gradients = path_of(config, 2)
    muon, normuon, wanted = scale_by_muon(4, momentum=0.8), scale_by_normuon(beta), kernel(path[0])
    matrices = [{"up": {"kernel": jnp.asarray(kernel(gradient), jnp.float32)}} for gradient in gradients]
    state, even_state = muon.init(matrices[0]), normuon.init(matrices[0])
    for gradient in matrices:
        update, state = muon.update(gradient, state)
        if beta:
            update, even_state = normuon.update(update, even_state)
        wanted = wanted - RATE * (np.asarray(update["up"]["kernel"], np.float64) + 0.5 * wanted)
    np.testing.assert_allclose(kernel(path[-1]), wanted, rtol=1e-5, atol=1e-6)
    for part in (embedding, norm_scale):
        adams = adam(part(path[0]), map(part, gradients), config, [3 * RATE] * 2, 0.0)
        np.testing.assert_allclose(part(path[-1]), adams, rtol=1e-4, atol=1e-6)


def test_clipping_is_of_all_gradients_together():
    """Gradients longer than `clip_norm` are scaled by one factor, before anything else sees them."""
    big_eps = {"eps": 1e3, "clip_norm": 2.0}  # so that Adam's update is proportional to the gradient
    path, (gradient,) = path_of(settings(**big_eps), 1)
    norm = np.sqrt(sum((part(gradient) ** 2).sum() for part in (kernel, embedding, norm_scale)))
    assert norm > 4
    for part, rate in ((kernel, RATE), (embedding, 3 * RATE), (norm_scale, 3 * RATE)):
        clipped = 2.0 / norm * part(gradient)
        moved = part(path[1]) - part(path[0])
        np.testing.assert_allclose(moved, -rate * clipped / (np.abs(clipped) + 1e3), atol=2e-7)
        assert np.abs(moved).max() > 1e-6
