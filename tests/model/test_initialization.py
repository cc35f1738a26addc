"""What induction heads start from: they look one token back, pass features on, and copy before any training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import build_config

from tale_jax.config import ModelConfig
from tale_jax.model.attention import causal_mask, rotary_angles, rotary_frequencies, rotate
from tale_jax.model.layers import rms_norm
from tale_jax.model.transformer import Transformer
from tale_jax.training.state import init_state

V = 96


def model_config(**changes) -> ModelConfig:
    shape = {"num_layers": 3, "embed_dim": 32, "num_heads": 4, "mlp_dim": 48, "seq_len": 16}
    shape |= {"zero_init_outputs": False, "induction_init": True, **changes}
    shape.setdefault("num_kv_heads", shape["num_heads"])
    shape.setdefault("head_dim", shape["embed_dim"] // shape["num_heads"])
    return dataclasses.replace(build_config().model, **shape)


def first_params(config, vocab_size=V):
    return init_state(Transformer(config, vocab_size), optax.sgd(0.1), seed=0).params


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}, {"qk_norm": False, "embed_dim": 128, "num_heads": 2}])
def test_induction_init_looks_one_token_back(changes):
    """Head 0 of layer 0 has most of its attention on the token before, whatever the tokens are."""
    c = model_config(**changes)
    params = first_params(c)
    attention, positions = params["blocks"]["attention"], jnp.arange(16)[None]

    def look(tokens):
        x = rms_norm(params["embedding"][tokens], jnp.ones(c.embed_dim), c.norm_eps)
        query, key = ((x @ attention[name]["kernel"][0, :, : c.head_dim])[:, None] for name in ("query", "key"))
        if c.qk_norm:
            query, key = (rms_norm(y, jnp.ones(c.head_dim), c.norm_eps) for y in (query, key))
        angles = rotary_angles(positions, rotary_frequencies(c.head_dim, c.rope_base))
        scores = jnp.einsum("bnth,bnsh->ts", rotate(query, angles), rotate(key, angles)) / c.head_dim**0.5
        return jax.nn.softmax(jnp.where(causal_mask(positions, positions)[0], scores, -1e30), axis=-1)

    for seed in range(3):
        weights = look(jax.random.randint(jax.random.PRNGKey(seed), (1, 16), 0, V))
        np.testing.assert_array_equal(weights[1:].argmax(-1), np.arange(15))


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}])
def test_induction_init_passes_on_features_above_the_first_layer(changes):
    """The first head of a higher layer keeps a part of what it mixes, another part in each layer; the rest is 0."""
    c = model_config(**changes)
    attention = first_params(c)["blocks"]["attention"]
    passed = []
    for layer in range(1, c.num_layers):
        kernels = (
            attention["value"]["kernel"][layer, :, : c.head_dim],
            attention["output"]["kernel"][layer, : c.head_dim],
        )
        through = kernels[0] @ kernels[1]
        np.testing.assert_array_equal(through, jnp.diag(jnp.diag(through)))
        passed += np.flatnonzero(jnp.diag(through)).tolist()
    assert len(set(passed)) == 2 * c.head_dim and 0 not in passed


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1}, {"qk_norm": False}])
def test_induction_init_copies_what_followed_before_any_training(changes):
    """Where random tokens are told twice, most of the second time is predicted, but for the token itself."""
    shape = {"embed_dim": 256, "num_heads": 4, "num_kv_heads": 2, "seq_len": 64, "zero_init_outputs": True}
    c = model_config(**(shape | changes), induction_match=True)
    params = first_params(c, 512)
    once = np.stack([np.random.default_rng(seed).permutation(512)[:32] for seed in range(8)])
    tokens = jnp.asarray(np.concatenate([once, once], axis=1))
    scores = np.array(Transformer(c, 512).apply({"params": params}, tokens)[0])
    np.put_along_axis(scores, np.asarray(tokens)[..., None], -np.inf, axis=-1)
    found = scores[:, :-1].argmax(-1) == np.asarray(tokens)[:, 1:]
    assert found[:, 32:].mean() > 0.8 and found[:, :31].mean() < 0.1


def test_induction_init_needs_a_key_value_head_of_its_own():
    with pytest.raises(ValueError, match=r"model\.induction_init=True must .*model\.num_kv_heads"):
        build_config(**{"model.induction_init": True, "model.num_heads": 2, "model.num_kv_heads": 1})
    with pytest.raises(ValueError, match=r"model\.induction_match=True must .*model\.induction_init"):
        build_config(**{"model.induction_init": False, "model.induction_match": True})
