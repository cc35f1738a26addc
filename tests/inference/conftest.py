"""A tiny model with random weights, its tokenizer and its sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers import build_config

from tale_jax.data.tokenizer import train_tokenizer
from tale_jax.inference.sampler import Sampler
from tale_jax.model.transformer import Transformer

CONTEXT = 32


@pytest.fixture(scope="package")
def tokenizer():
    config = dataclasses.replace(build_config().tokenizer, vocab_size=320)
    tales = [f"The cat sat on mat {i}, and the dog and the hen saw the cat. The end.\n" for i in range(200)]
    return train_tokenizer(tales, config)


@pytest.fixture(scope="package")
def make_model(tokenizer):
    """Makes a model and random weights, so large that some tokens are much likelier than others."""

    def make(dtype=jnp.float32, **changes):
        shape = {"num_layers": 2, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 48}
        config = dataclasses.replace(build_config().model, **(shape | {"seq_len": CONTEXT} | changes))
        model = Transformer(config, tokenizer.vocab_size, dtype)
        params = model.init(jax.random.PRNGKey(0), jnp.zeros((1, 4), jnp.int32))["params"]
        leaves, tree = jax.tree_util.tree_flatten(params)
        keys = jax.random.split(jax.random.PRNGKey(1), len(leaves))
        noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        return model, jax.tree_util.tree_unflatten(tree, noisy)

    return make


@pytest.fixture(scope="package")
def tiny_model(make_model):
    return make_model()


@pytest.fixture(scope="package")
def sampler(tiny_model, tokenizer):
    return Sampler(*tiny_model, tokenizer)
