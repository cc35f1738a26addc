"""The kernels, together, against a plain model: 200 steps of training lose alike.

The plain forms are what one would write first: `x @ w`, a whole matrix of scores, all logits in float32, and every
gradient by automatic differentiation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_config

from tale_jax.model import layers as ops
from tale_jax.model import transformer
from tale_jax.training.step import make_trainer

STEPS = 200


def rms_norm(x, scale, eps):
    wide = x.astype(jnp.float32)
    return (wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps) * scale).astype(x.dtype)


def attention(query, key, value, mask, materialize_transposes, causal):
    shared = query.shape[1] // key.shape[1]
    key, value = jnp.repeat(key, shared, axis=1), jnp.repeat(value, shared, axis=1)
    scores = jnp.einsum("bnth,bnsh->bnts", query, key).astype(jnp.float32) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bnts,bnsh->bnth", weights.astype(value.dtype), value)


def weighted_cross_entropy(x, table, targets, weights, head):
    logits = (x @ table.T.astype(x.dtype)).astype(jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * chosen)


def make_plain(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ops, "rms_norm", rms_norm)
    patch.setattr(ops, "swiglu", lambda gate, up: jax.nn.silu(gate) * up)
    patch.setattr(ops, "matmul", lambda x, w, materialize_transposes: x @ w)
    patch.setattr(ops, "attention", attention)
    patch.setattr(transformer, "weighted_cross_entropy", weighted_cross_entropy)


def losses(cpu, dtype) -> np.ndarray:
    """Of a small model that learns to go on with a sequence that repeats itself."""
    changes = {
        "model.num_layers": 2,
        "model.embed_dim": 64,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.seq_len": 192,  # two blocks of attention
        "tokenizer.vocab_size": 512,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 3e-4,
        "optimizer.eps": 1e-4,  # Adam divides rounding noise by it where gradients vanish
        "total_steps": STEPS,
        "batch_size": 4,
    }
    config = build_config(**changes).with_total_steps(100)
    trainer = make_trainer(config, cpu, dtype, bos_id=1)
    state, rng, found = trainer.init(), np.random.default_rng(0), []
    for _ in range(STEPS):
        again = rng.integers(4, 36, (4, 24), np.int32)
        state, metrics = trainer.step(state, trainer.place(np.tile(again, 9)[:, :193]))
        found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.mark.parametrize(("dtype", "allowed"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_two_hundred_steps_lose_as_the_plain_forms(cpu, monkeypatch, dtype, allowed):
    fast = losses(cpu, dtype)
    with monkeypatch.context() as patch:
        make_plain(patch)
        plain = losses(cpu, dtype)
    off = np.max(np.abs(fast / plain - 1))
    print(f"{jnp.dtype(dtype).name}: from {fast[0]:.4f} to {fast[-1]:.4f} nats; at most {off:.1e} off the plain forms")
    assert fast[-1] < fast[0] - 1  # something was learned
    assert 0 < off < allowed
