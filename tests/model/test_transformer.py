"""Properties of the model: causality, documents, cache, and agreement with LLaMA written down a second time."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import build_config

from tale_jax.model import layers as ops
from tale_jax.model.transformer import Cache, Transformer, count_parameters, flops_per_token
from tale_jax.training.state import init_state

V = 96


def make(materialize_transposes=False, remat="none", dtype=jnp.float32, **changes):
    """A tiny model with every weight random, so that no path is silent."""
    names = {"num_layers": 3, "embed_dim": 32, "num_heads": 4, "mlp_dim": 48, "seq_len": 16, "zero_init_outputs": False}
    config = dataclasses.replace(build_config().model, **(names | changes))
    model = Transformer(config, V, dtype, materialize_transposes, remat)
    params = model.init(jax.random.PRNGKey(0), jnp.zeros((1, 4), jnp.int32))["params"]
    leaves, tree = jax.tree_util.tree_flatten(params)
    keys = jax.random.split(jax.random.PRNGKey(1), len(leaves))
    noisy = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return model, jax.tree_util.tree_unflatten(tree, noisy)


@pytest.fixture
def tokens():
    return jax.random.randint(jax.random.PRNGKey(2), (2, 16), 0, V)


def llama(params, tokens, config):
    """LLaMA in numpy and float64, one token and one head at a time, from the papers: the independent reference."""
    p = jax.tree_util.tree_map(lambda x: np.asarray(x, np.float64), params)
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.embed_dim // config.num_heads

    def norm(x, scale):
        return x / np.sqrt((x**2).mean() + config.norm_eps) * scale

    def turn(x, position):
        y = np.empty_like(x)
        for i in range(width // 2):
            angle = position / config.rope_base ** (2 * i / width)
            pair = complex(x[i], x[i + width // 2]) * complex(np.cos(angle), np.sin(angle))
            y[i], y[i + width // 2] = pair.real, pair.imag
        return y

    rows = []
    for row in np.asarray(tokens):
        xs = [p["embedding"][t] * (width * heads) ** (config.scale_embeddings / 2) for t in row]
        for layer in range(config.num_layers):
            w = jax.tree_util.tree_map(lambda a, n=layer: a[n], p["blocks"])
            a = w["attention"]
            keys, values, out = [], [], []
            for t, x in enumerate(xs):
                h = norm(x, w["attention_norm"]["scale"])
                query, key, value = ((h @ a[n]["kernel"]).reshape(-1, width) for n in ("query", "key", "value"))
                if config.qk_norm:
                    query = [norm(q, a["query_norm"]["scale"]) for q in query]
                    key = [norm(k, a["key_norm"]["scale"]) for k in key]
                keys.append([turn(k, t) for k in key])
                values.append(value)
                mixed = []
                for n in range(heads):
                    q, shared = turn(query[n], t), n // (heads // kv_heads)
                    scores = np.array([q @ keys[s][shared] / np.sqrt(width) for s in range(t + 1)])
                    weights = np.exp(scores - scores.max())
                    weights /= weights.sum()
                    mixed.append(sum(weights[s] * values[s][shared] for s in range(t + 1)))
                out.append(x + np.concatenate(mixed) @ a["output"]["kernel"])
            xs = []
            for x in out:
                h = norm(x, w["mlp_norm"]["scale"])
                gate = h @ w["mlp"]["gate"]["kernel"]
                xs.append(
                    x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp"]["up"]["kernel"])) @ w["mlp"]["down"]["kernel"]
                )
        head = p["embedding"].T if config.tie_embeddings else p["head"]
        rows.append([norm(x, p["final_norm"]["scale"]) @ head for x in xs])
    return np.array(rows)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("ours", [True, False])  # with normalised queries and keys and a scaled embedding, or without
def test_agrees_with_llama(tokens, num_kv_heads, tie_embeddings, ours):
    model, params = make(num_kv_heads=num_kv_heads, tie_embeddings=tie_embeddings, qk_norm=ours, scale_embeddings=ours)
    logits, _ = model.apply({"params": params}, tokens)
    np.testing.assert_allclose(logits, llama(params, tokens, model.config), atol=1e-4)


def test_causal_by_gradient(tokens):
    """No logit depends on a later token's embedding, and each depends on its own."""
    model, params = make()

    def logit_sum(embedding_noise, position):
        noisy = params | {"embedding": params["embedding"] + embedding_noise}
        return model.apply({"params": noisy}, jnp.arange(16)[None])[0][0, position].sum()

    model = model.clone(config=dataclasses.replace(model.config, tie_embeddings=False))
    params = params | {"head": jax.random.normal(jax.random.PRNGKey(3), (32, V))}
    for position in (0, 7, 15):
        moved = jnp.abs(jax.grad(logit_sum)(jnp.zeros_like(params["embedding"]), position)).sum(-1)[:16]
        assert (moved[: position + 1] > 0).all() and (moved[position + 1 :] == 0).all()


def test_documents_do_not_see_each_other(tokens):
    model, params = make()
    segments = jnp.where(jnp.arange(16) < 6, 0, 1)[None].repeat(2, 0)
    masked, _ = model.apply({"params": params}, tokens, segments=segments)
    alone, _ = model.apply({"params": params}, tokens[:, 6:])
    together, _ = model.apply({"params": params}, tokens)
    np.testing.assert_allclose(masked[:, 6:], alone, atol=1e-5)  # rotary positions are relative
    assert jnp.abs(masked[:, 6:] - together[:, 6:]).max() > 1e-2


def loss_and_gradients(model, params, tokens):
    def loss(p):
        return jnp.square(model.apply({"params": p}, tokens)[0]).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat", ["none", "block", "dots_saveable"])
@pytest.mark.parametrize("materialize_transposes", [False, True])
def test_scan_remat_and_layout_change_neither_names_nor_values(tokens, scan_layers, remat, materialize_transposes):
    plain, params = make()
    model, same = make(scan_layers=scan_layers, remat=remat, materialize_transposes=materialize_transposes)
    jax.tree_util.tree_map(np.testing.assert_array_equal, params, same)
    (loss, grads), (loss2, grads2) = (loss_and_gradients(m, params, tokens) for m in (plain, model))
    np.testing.assert_allclose(loss, loss2, rtol=1e-5)
    jax.tree_util.tree_map(partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-6), grads, grads2)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_prefill_and_decode_equal_the_full_forward(tokens, num_kv_heads):
    model, params = make(num_kv_heads=num_kv_heads)
    full, _ = model.apply({"params": params}, tokens)
    logits, cache = model.apply({"params": params}, tokens[:, :9], cache=Cache.empty(model.config, 2, jnp.float32))
    parts = [logits]
    for t in range(9, 16):
        logits, cache = model.apply({"params": params}, tokens[:, t : t + 1], cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=2e-5)
    assert int(cache.length) == 16


def test_one_layer_ring_forgets_what_is_older_than_the_context():
    """Past the context a one-layer model sees exactly the last `seq_len` tokens (deeper ones, further)."""
    model, params = make(num_layers=1)
    tokens = jax.random.randint(jax.random.PRNGKey(4), (1, 25), 0, V)
    cache = Cache.empty(model.config, 1, jnp.float32)
    for t in range(25):
        logits, cache = model.apply({"params": params}, tokens[:, t : t + 1], cache=cache)
    window, _ = model.apply({"params": params}, tokens[:, -16:])
    np.testing.assert_allclose(logits[:, 0], window[:, -1], atol=2e-5)


def test_only_gives_the_logits_of_one_position(tokens):
    model, params = make()
    full, _ = model.apply({"params": params}, tokens)
    one, _ = model.apply({"params": params}, tokens, only=jnp.asarray(5))
    np.testing.assert_allclose(one[:, 0], full[:, 5], atol=1e-6)


def test_softcap_bounds_logits_and_dropout_needs_its_rng(tokens):
    model, params = make(logit_softcap=0.5)
    assert jnp.abs(model.apply({"params": params}, tokens)[0]).max() <= 0.5
    model, params = make(dropout=0.5)
    dropped = [
        model.apply({"params": params}, tokens, deterministic=False, rngs={"dropout": jax.random.PRNGKey(k)})[0]
        for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert jnp.abs(dropped[0] - dropped[2]).max() > 1e-3


def test_word_dropout_drops_ids_wherever_they_stand_and_only_in_training():
    """What goes into the blocks: rows of the table, whole ones gone and the others larger."""
    model, params = make(embedding_dropout=0.25, scale_embeddings=False)
    tokens = jnp.tile(jnp.arange(V), (3, 1)).at[1].set(jnp.arange(V)[::-1])[:, :64]

    def embedded(**how):
        where = {"capture_intermediates": lambda m, _: m.path == ("dropout",), "mutable": ["intermediates"]}
        return np.asarray(
            model.apply({"params": params}, tokens, **where, **how)[1]["intermediates"]["dropout"]["__call__"][0]
        )

    table = np.asarray(params["embedding"])
    np.testing.assert_array_equal(embedded(), table[tokens])
    found = embedded(deterministic=False, rngs={"dropout": jax.random.PRNGKey(0)})
    gone = {int(t) for t, row in zip(tokens.ravel(), found.reshape(-1, 32), strict=True) if not row.any()}
    kept = {int(t) for t in tokens.ravel()} - gone
    assert 0.1 < len(gone) / (len(gone) + len(kept)) < 0.4
    np.testing.assert_allclose(found, table[tokens] * np.isin(tokens, list(kept))[..., None] / 0.75, rtol=1e-6)
    again = embedded(deterministic=False, rngs={"dropout": jax.random.PRNGKey(1)})
    assert (again != found).any()


def test_bfloat16_stays_near_float32(tokens):
    model, params = make(materialize_transposes=True)
    wide, _ = model.apply({"params": params}, tokens)
    narrow, _ = model.clone(dtype=jnp.bfloat16).apply({"params": params}, tokens)
    assert narrow.dtype == jnp.bfloat16
    assert jnp.abs(narrow.astype(jnp.float32) - wide).max() < 0.1 * jnp.abs(wide).max()


def test_counts_by_hand():
    model, params = make(num_kv_heads=2, qk_norm=False)
    by_hand = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32) + V * 32 + 32
    assert count_parameters(params) == by_hand
    products = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + V * 32
    assert flops_per_token(model.config, V) == 6 * products + 6 * 3 * 16 * 32


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}, {"qk_norm": False, "embed_dim": 128, "num_heads": 2}])
def test_induction_init_looks_one_token_back(changes):
    """Head 0 of layer 0 has most of its attention on the token before, whatever the tokens are."""
    model, _ = make(**changes)
    c = dataclasses.replace(model.config, induction_init=True)
    params = init_state(Transformer(c, V), optax.sgd(0.1), seed=0).params
    attention, positions = params["blocks"]["attention"], jnp.arange(16)[None]

    def look(tokens):
        x = ops.rms_norm(params["embedding"][tokens], jnp.ones(c.embed_dim), c.norm_eps)
        query, key = ((x @ attention[name]["kernel"][0, :, : c.head_dim])[:, None] for name in ("query", "key"))
        if c.qk_norm:
            query, key = (ops.rms_norm(y, jnp.ones(c.head_dim), c.norm_eps) for y in (query, key))
        angles = ops.rotary_angles(positions, c.head_dim, c.rope_base)
        scores = jnp.einsum("bnth,bnsh->ts", ops.rotate(query, angles), ops.rotate(key, angles)) / c.head_dim**0.5
        return jax.nn.softmax(jnp.where(ops.causal_mask(positions, positions)[0], scores, -1e30), axis=-1)

    for seed in range(3):
        weights = look(jax.random.randint(jax.random.PRNGKey(seed), (1, 16), 0, V))
        np.testing.assert_array_equal(weights[1:].argmax(-1), np.arange(15))


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}])
def test_induction_init_passes_on_features_above_the_first_layer(changes):
    """The first head of a higher layer keeps a part of what it mixes, another part in each layer; the rest is 0."""
    c = dataclasses.replace(make(**changes)[0].config, induction_init=True)
    attention = init_state(Transformer(c, V), optax.sgd(0.1), seed=0).params["blocks"]["attention"]
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
    """Where random tokens are told twice, most of the second time is foretold, but for the token itself."""
    shape = {"embed_dim": 256, "num_heads": 4, "num_kv_heads": 2, "seq_len": 64, "zero_init_outputs": True}
    c = dataclasses.replace(make(**(shape | changes))[0].config, induction_init=True, induction_match=True)
    model = Transformer(c, 512)
    params = init_state(model, optax.sgd(0.1), seed=0).params
    once = np.stack([np.random.default_rng(seed).permutation(512)[:32] for seed in range(8)])
    tokens = jnp.asarray(np.concatenate([once, once], axis=1))
    scores = np.array(model.apply({"params": params}, tokens)[0])
    np.put_along_axis(scores, np.asarray(tokens)[..., None], -np.inf, axis=-1)
    found = scores[:, :-1].argmax(-1) == np.asarray(tokens)[:, 1:]
    assert found[:, 32:].mean() > 0.8 and found[:, :31].mean() < 0.1


def test_induction_init_needs_a_key_value_head_of_its_own():
    with pytest.raises(ValueError, match=r"model\.induction_init=True must .*model\.num_kv_heads"):
        build_config(**{"model.induction_init": True, "model.num_heads": 2, "model.num_kv_heads": 1})
    with pytest.raises(ValueError, match=r"model\.induction_match=True must .*model\.induction_init"):
        build_config(**{"model.induction_init": False, "model.induction_match": True})


def test_fused_attention_is_the_blocked_one(monkeypatch):
    """In half precision, for plain causal attention only; through JAX's own form of it, since cuDNN needs a GPU."""
    calls = []

    def cudnn_attention(query, key, value):
        calls.append(query.shape)
        return plain(query, key, value, implementation="xla")

    plain = ops.cudnn_causal_attention
    monkeypatch.setattr(ops, "cudnn_causal_attention", cudnn_attention)
    shape = {"embed_dim": 64, "num_heads": 4, "num_kv_heads": 2, "seq_len": 32}
    c = dataclasses.replace(make(**shape)[0].config, num_layers=2)
    tokens = jax.random.randint(jax.random.PRNGKey(1), (2, 32), 0, V)
    params = Transformer(c, V).init(jax.random.PRNGKey(0), tokens)["params"]

    def scores(cudnn_attention, dtype, **more):
        return (
            Transformer(c, V, dtype, cudnn_attention=cudnn_attention)
            .apply({"params": params}, tokens, **more)[0]
            .astype(jnp.float32)
        )

    np.testing.assert_allclose(scores(True, jnp.bfloat16), scores(False, jnp.bfloat16), atol=2e-2)
    taken = len(calls)
    assert taken
    scores(True, jnp.float32)
    scores(True, jnp.bfloat16, segments=tokens * 0)
    scores(True, jnp.bfloat16, cache=Cache.empty(c, 2, jnp.bfloat16))
    assert len(calls) == taken
