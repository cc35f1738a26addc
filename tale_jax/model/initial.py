"""Weights that are better begun than found: a head that looks at the previous token.

To copy a name from earlier in a text, a transformer learns two things that are of no use alone: a head that writes into
each token what stood before it, and a later head that looks for a token with the right thing before it (Elhage et al.
2021, Olsson et al. 2022: induction). Loss falls only when both are there, so small models wait long for the first. Its
solution is known, and rotary positions can express it, so one head of the first layer starts as it. After that it is
trained like any other weight. (Trockman and Kolter 2023 begin attention in the same spirit.)
"""

import math
from typing import Any

import jax.numpy as jnp

from tale_jax.config import ModelConfig

EMBEDDING_STD = 0.02


def with_previous_token_head(params: Any, config: ModelConfig) -> Any:
    """The same weights, but the first key/value head of layer 0 and its queries look one token back.

    Feature 0 of all embeddings becomes one constant, from which queries and keys are made that depend on the position
    alone. The key is turned back by one step of each of the quickest rotations, so that their sum is greatest, at the
    width of a head times head_dim**-0.5, where the key stands one token before the query. Slow rotations, which cannot
    tell neighbours apart, have no part in it. The weights need no second name: the model stays a plain LLaMA.
    """
    c = config
    half, pairs = c.head_dim // 2, max(1, c.head_dim // 16)
    angles = c.rope_base ** (-jnp.arange(pairs) * 2.0 / c.head_dim)
    constant = 4 * EMBEDDING_STD
    normalised = constant / math.sqrt((constant**2 + (c.embed_dim - 1) * EMBEDDING_STD**2) / c.embed_dim)
    size = math.sqrt(c.head_dim / pairs) / normalised
    rest = jnp.zeros(half - pairs)
    query = size * jnp.concatenate([jnp.ones(pairs), rest, jnp.zeros(half)])
    key = size * jnp.concatenate([jnp.cos(angles), rest, jnp.sin(angles), rest])

    def positional(kernel: Any, row: Any) -> Any:
        return kernel.at[0, :, : row.size].set(0.0).at[0, 0, : row.size].set(row)

    attention = dict(params["blocks"]["attention"])
    group = c.num_heads // c.num_kv_heads
    attention["query"] = {"kernel": positional(attention["query"]["kernel"], jnp.tile(query, group))}
    attention["key"] = {"kernel": positional(attention["key"]["kernel"], key)}
    return params | {
        "embedding": params["embedding"].at[:, 0].set(constant),
        "blocks": params["blocks"] | {"attention": attention},
    }
