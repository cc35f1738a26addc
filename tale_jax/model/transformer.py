"""A LLaMA-style decoder in linen: one forward pass for training, scoring and cached decoding.

RMS norm before each branch, rotary positions, grouped-query attention, a SwiGLU MLP (Touvron et al. 2023), optional
normalised queries and keys (Dehghani et al. 2023), a tied head. The cache is an
argument and a result like any other array, so every use of the model is a pure function of its inputs.

The weights of all layers are stacked along a leading axis L, whether they run in a compiled loop (`scan_layers`) or one
after another: names, shapes and initial values do not depend on `scan_layers` or `remat`.
"""

import math
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tale_jax.config import Config, ModelConfig
from tale_jax.data.marks import token_ids
from tale_jax.model.adapters import ADAPTERS, apply
from tale_jax.model.attention import (
    attention,
    attention_weights,
    causal_mask,
    cudnn_causal_attention,
    rotary_angles,
    rotary_frequencies,
    rotate,
)
from tale_jax.model.decoding import Cache, attend_one, write_slots
from tale_jax.model.initialization import EMBEDDING_STD
from tale_jax.model.layers import dropout, matmul, rms_norm, split_heads, swiglu
from tale_jax.model.loss import Head, cross_entropy, logits, weighted_cross_entropy
from tale_jax.model.packed import documents_apart

# `apply(..., mutable=[TAPS])` also gives what happens inside: `embedded` [B, T, D], and of the blocks `residual`
# [L, B, T, D] and `attention/weights` [L, B, N, T, S], each in a tuple of one. Otherwise nothing of it is computed.
TAPS = "intermediates"


@runtime_checkable
class Kernels(Protocol):
    """What a model must know of the machine it runs on; a `Backend` says it."""

    @property
    def materialize_transposes(self) -> bool: ...

    @property
    def cudnn_attention(self) -> bool: ...


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32), self.eps)


class Dropout(nn.Module):
    """Drops elements, by the rng "dropout", unless `deterministic` (Srivastava et al. 2014)."""

    rate: float
    deterministic: bool

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return x if self.deterministic or not self.rate else dropout(x, self.rate, self.make_rng("dropout"))


class Dense(nn.Module):
    """A product with a float32 kernel [in, out], computed in `dtype`; no bias."""

    features: int
    dtype: Any
    materialize_transposes: bool
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T {self.features}"]:
        init = nn.initializers.zeros_init() if self.zero_init else nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        return matmul(x, kernel.astype(self.dtype), self.materialize_transposes)


class Attention(nn.Module):
    config: ModelConfig
    dtype: Any
    materialize_transposes: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Float[Array, "_ T half"],
        mask: Bool[Array, "_ T S"] | None,
        slot: Int[Array, "*B"],
        cached: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]] | None]:
        c = self.config

        def heads(name: str, count: int) -> Float[Array, "B N T H"]:
            y = Dense(count * c.head_dim, self.dtype, self.materialize_transposes, name=name)(x)
            return split_heads(y, count, self.materialize_transposes)

        query, key, value = heads("query", c.num_heads), heads("key", c.num_kv_heads), heads("value", c.num_kv_heads)
        if c.qk_norm:
            query, key = RMSNorm(c.norm_eps, name="query_norm")(query), RMSNorm(c.norm_eps, name="key_norm")(key)
        query, key = rotate(query, angles), rotate(key, angles)
        if cached is not None:
            key, value = (
                write_slots(old, new.astype(old.dtype), slot, axis=2)
                for old, new in zip(cached, (key, value), strict=True)
            )
            cached = key, value
        key, value = key.astype(self.dtype), value.astype(self.dtype)
        if mask is not None and self.is_mutable_collection(TAPS):
            self.sow(TAPS, "weights", attention_weights(query, key, mask))
        if mask is None:
            mixed = cudnn_causal_attention(query, key, value)
        elif cached is not None and x.shape[1] == 1:
            mixed = attend_one(query, key, value, mask)
        else:
            mixed = attention(query, key, value, mask, self.materialize_transposes, causal=cached is None)
        output = Dense(c.embed_dim, self.dtype, self.materialize_transposes, c.zero_init_outputs, name="output")
        return output(mixed.swapaxes(1, 2).reshape(*x.shape[:2], -1)), cached


class MLP(nn.Module):
    config: ModelConfig
    dtype: Any
    materialize_transposes: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        gate = Dense(c.mlp_dim, self.dtype, self.materialize_transposes, name="gate")(x)
        up = Dense(c.mlp_dim, self.dtype, self.materialize_transposes, name="up")(x)
        down = Dense(c.embed_dim, self.dtype, self.materialize_transposes, c.zero_init_outputs, name="down")
        return down(swiglu(gate, up))


class Block(nn.Module):
    """One layer: attention and MLP, each on a normalised copy of the residual stream, and added to it."""

    config: ModelConfig
    dtype: Any
    materialize_transposes: bool
    deterministic: bool

    @nn.compact
    def __call__(self, x, angles, mask, slot, cached):
        c = self.config
        drop = Dropout(c.dropout, self.deterministic, name="dropout")
        mixed, cached = Attention(c, self.dtype, self.materialize_transposes, name="attention")(
            RMSNorm(c.norm_eps, name="attention_norm")(x), angles, mask, slot, cached
        )
        x = x + drop(mixed)
        mlp = MLP(c, self.dtype, self.materialize_transposes, name="mlp")
        x = x + drop(mlp(RMSNorm(c.norm_eps, name="mlp_norm")(x)))
        self.sow(TAPS, "residual", x)
        return x, cached


class Transformer(nn.Module):
    """The decoder.

    Attributes:
      config: its shape.
      vocab_size: number of token ids, V.
      dtype: what it computes in; weights are float32 always, and so are norms, softmax and reductions.
      materialize_transposes: products in the layout that XLA on CPU computes natively (see `layers.py`).
      remat: what the backward pass recomputes: "none", "block", or a policy of `jax.checkpoint_policies`.
      cudnn_attention: in half precision, attention by cuDNN wherever nothing but what comes later is hidden.
      batch_sharding: of activations; None: as XLA finds it from the weights, which it may then leave where they are.
    """

    config: ModelConfig
    vocab_size: int
    dtype: Any = jnp.float32
    materialize_transposes: bool = False
    remat: str = "none"
    cudnn_attention: bool = False
    batch_sharding: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
        logits_at: Int[Array, ""] | None = None,
        targets: Int[Array, "B T"] | None = None,
        weights: Float[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B _ V"] | Float[Array, "B T"] | Float[Array, ""], Cache | None]:
        """Logits of the token that follows each position, or the nats of `targets`.

        Args:
          tokens: ids.
          positions: of the tokens, in rising order; by default they count on from the cache, or from 0. -1 marks
            padding.
          segments: documents; attention stays inside one. Without a cache only.
          cache: what came before. The T tokens go to the next slots of its ring, and must not wrap around in one call.
          deterministic: no dropout of elements or of rows of the embedding (otherwise the rng "dropout" is needed).
          logits_at: the one index along T whose logits are wanted; the result is then [B, 1, V].
          targets: the result is then the nats of each target [B, T], and the logits are never all in memory.
          weights: the result is then one number, the sum of weight times nats: the quickest to differentiate.

        Returns:
          logits in `dtype` (or nats in float32), and the cache with these tokens in it (None if none was given).
        """
        c = self.config
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length
        plain = cache is None and positions is None and segments is None
        if positions is None:
            index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = jnp.broadcast_to((start[:, None] if start.ndim else start) + index, tokens.shape)
        if cache is None:
            slot, slot_positions = start, positions
            mask = causal_mask(positions, positions, segments, segments)
            fits = jnp.dtype(self.dtype).itemsize == 2 and c.head_dim in range(8, 129, 8)
            if self.cudnn_attention and plain and fits:
                mask = None
            elif self.materialize_transposes:
                mask = jax.lax.optimization_barrier(mask)
        else:
            num_slots = cache.positions.shape[1]
            slot = start % num_slots
            slot_positions = write_slots(cache.positions, positions, slot, axis=1)
            mask = causal_mask(positions, slot_positions, window=num_slots)
        frequencies = rotary_frequencies(c.head_dim, c.rope_base, c.rope_scaling, c.rope_original_len)
        angles = rotary_angles(positions, frequencies)

        embedding = self.param(
            "embedding", nn.initializers.normal(EMBEDDING_STD), (self.vocab_size, c.embed_dim), jnp.float32
        )
        x = jnp.take(embedding, tokens, axis=0)
        if self.batch_sharding is not None:
            x = jax.lax.with_sharding_constraint(x, self.batch_sharding)
        if c.embedding_dropout and not deterministic:
            # Whole rows of the table, so that a token is gone wherever it stands (Merity et al. 2018).
            kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - c.embedding_dropout, (self.vocab_size,))
            x = x * jnp.take(kept / (1 - c.embedding_dropout), tokens, axis=0)[..., None]
        if c.scale_embeddings:
            x = x * c.embed_dim**0.5
        x = x.astype(self.dtype)
        x = Dropout(c.dropout, deterministic, name="dropout")(x)
        self.sow(TAPS, "embedded", x)

        cached = None if cache is None else (cache.keys, cache.values)
        blocks = self._stack()(c, self.dtype, self.materialize_transposes, deterministic, name="blocks")
        x, cached = blocks(x, angles, mask, slot, cached)
        if cache is not None and cached is not None:
            cache = Cache(cached[0], cached[1], slot_positions, start + tokens.shape[1])

        if logits_at is not None:
            x = jax.lax.dynamic_slice_in_dim(x, logits_at, 1, axis=1)
        x = RMSNorm(c.norm_eps, name="final_norm")(x)
        rows = self.batch_sharding
        parts = 1 if rows is None else math.prod(rows.mesh.shape[axis] for axis in rows.spec[0])
        head = Head(c.tie_embeddings, self.materialize_transposes, parts)
        table = embedding
        if not c.tie_embeddings:
            table = self.param("head", nn.initializers.lecun_normal(), (c.embed_dim, self.vocab_size), jnp.float32)
        if targets is None:
            return logits(x, table, head), cache
        if weights is None:
            return cross_entropy(x, table, targets, head), cache
        return weighted_cross_entropy(x, table, targets, weights, head), cache

    def _stack(self) -> Any:
        """`Block` over the layers: rematerialised as asked, a loop or unrolled, its weights stacked either way."""
        block: Any = Block
        if self.remat != "none":
            policy = None if self.remat == "block" else getattr(jax.checkpoint_policies, self.remat)
            # Outside a loop XLA would find the recomputation again and undo it, so it must not share subexpressions.
            block = nn.remat(Block, policy=policy, prevent_cse=not self.config.scan_layers)
        return nn.scan(
            block,
            variable_axes={"params": 0, ADAPTERS: 0, TAPS: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            out_axes=0,
            length=self.config.num_layers,
            unroll=1 if self.config.scan_layers else self.config.num_layers,
        )


def make_model(config: Config, kernels: Kernels, dtype: Any) -> Transformer:
    """The decoder of a run, computing in `dtype` with the kernels that a backend is good at."""
    return Transformer(
        config.model,
        config.tokenizer.vocab_size,
        dtype,
        kernels.materialize_transposes,
        config.remat,
        kernels.cudnn_attention,
    )


def token_losses(
    model: Transformer,
    params: Any,
    windows: Int[Array, "B T1"],
    bos_id: int,
    weights: Float[Array, "B T"] | None = None,
    dropout_key: Array | None = None,
) -> Float[Array, "B T"] | Float[Array, ""]:
    """Nats of each token of a batch of windows but the first, or with `weights` their weighted sum.

    Training and scoring both call this; which tokens count is said by `loss_mask`. `params` may be `Adapted`.
    """
    inputs, targets = windows[:, :-1], token_ids(windows[:, 1:], bos_id)
    apart = documents_apart(inputs, bos_id) if model.config.mask_documents else {}
    return apply(
        model,
        params,
        token_ids(inputs, bos_id),
        targets=targets,
        weights=weights,
        deterministic=dropout_key is None,
        **apart,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )[0]


def count_parameters(params: Any) -> int:
    """Number of weights in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree_util.tree_leaves(params))


def flops_per_token(config: ModelConfig, vocab_size: int) -> int:
    """Model FLOPs of training on one token, forward and backward: 6 a weight in a product, and attention's.

    Of attention the causal half is counted, at the full context length (PaLM, appendix B, halved).
    """
    c = config
    layer = c.embed_dim * c.head_dim * 2 * (c.num_heads + c.num_kv_heads) + 3 * c.embed_dim * c.mlp_dim
    weights = c.num_layers * layer + vocab_size * c.embed_dim
    return 6 * weights + 6 * c.num_layers * c.seq_len * c.num_heads * c.head_dim
