"""What decoding adds to the model: the cache of keys and values, and attention of one query.

Training uses none of it. Axes: B batch, S slot, N heads, K key/value heads, H head width, L layers.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tale_jax.config import ModelConfig
from tale_jax.model.attention import MASKED


class Cache(flax.struct.PyTreeNode):
    """Keys and values already computed: a ring of S slots for each layer, the oldest overwritten first.

    `length` is one number where all rows are equally long, or one for each row.
    """

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]
    positions: Int[Array, "B S"]  # of the token in each slot; -1 is empty
    length: Int[Array, "*B"]  # tokens written so far

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, dtype: Any, num_slots: int = 0) -> "Cache":
        """A cache for `batch_size` sequences with `num_slots` slots (0: the context length of the model)."""
        num_slots = num_slots or config.seq_len
        shape = (config.num_layers, batch_size, config.num_kv_heads, num_slots, config.head_dim)
        return cls(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            positions=jnp.full((batch_size, num_slots), -1, jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )


def write_slots(ring: Array, new: Array, slot: Array, axis: int) -> Array:
    """The ring [B, ...] with `new` from `slot` on along `axis`; each row has a slot of its own where there are [B]."""
    if not slot.ndim:
        return jax.lax.dynamic_update_slice_in_dim(ring, new, slot, axis)
    return jax.vmap(lambda r, n, s: jax.lax.dynamic_update_slice_in_dim(r, n, s, axis - 1))(ring, new, slot)


def attend_one(
    query: Float[Array, "B N 1 H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "_ 1 S"],
) -> Float[Array, "B N 1 H"]:
    """`attention` of one query a sequence, as decoding asks for it: the same values, by sums instead of products.

    A product of one row is no work, only a passage over the cache. As a sum XLA fuses it with the conversion to
    float32; as a product of bfloat16 on a CPU it first writes the whole cache again in float32 (up to seven times
    slower, measured).
    """
    batch, heads, _, width = query.shape
    grouped = (query * width**-0.5).reshape(batch, key.shape[1], -1, 1, width).astype(jnp.float32)
    scores = jnp.sum(grouped * key[:, :, None].astype(jnp.float32), axis=-1)  # [B, K, G, S]
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)
    mixed = jnp.sum(weights[..., None] * value[:, :, None].astype(jnp.float32), axis=-2)
    return mixed.reshape(batch, heads, 1, width).astype(value.dtype)
