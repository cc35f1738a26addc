"""Properties of the model: causality, documents, cache, and agreement with LLaMA written down a second time."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, assert_trees_equal, build_config

from tale_jax.model import transformer
from tale_jax.model.decoding import Cache
from tale_jax.model.transformer import (
    Transformer,
    count_parameters,
    flops_per_token,
    make_model,
    token_losses,
)
from tale_jax.training.step import make_trainer

V = 96


def make(materialize_transposes=False, remat="none", dtype=jnp.float32, **changes):
    """A tiny model with every weight random, so that no path is silent."""
    names = {"num_layers": 3, "embed_dim": 32, "num_heads": 4, "mlp_dim": 48, "seq_len": 16, "zero_init_outputs": False}
    names |= {"mask_documents": False, "induction_init": False}
    config = dataclasses.replace(build_config().model, **(names | changes))
    config = dataclasses.replace(config, head_dim=config.embed_dim // config.num_heads)
    model = Transformer(config, V, dtype, materialize_transposes, remat)
    params = model.init(jax.random.PRNGKey(0), jnp.zeros((1, 4), jnp.int32))["params"]
    leaves, tree = jax.tree_util.tree_flatten(params)
    keys = jax.random.split(jax.random.PRNGKey(1), len(leaves))
    noisy = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return model, jax.tree_util.tree_unflatten(tree, noisy)


@functools.cache
def compiled(model):
    return jax.jit(model.apply, static_argnames="deterministic")


def apply(model, params, tokens, **more):
    return compiled(model)({"params": params}, tokens, **more)


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
    logits, _ = apply(model, params, tokens)
    np.testing.assert_allclose(logits, llama(params, tokens, model.config), atol=1e-4)


def test_causal_by_gradient(tokens):
    """No logit depends on a later token's embedding, and each depends on its own."""
    model, params = make()

    def logit_sum(embedding_noise, position):
        noisy = params | {"embedding": params["embedding"] + embedding_noise}
        return apply(model, noisy, jnp.arange(16)[None])[0][0, position].sum()

    model = model.clone(config=dataclasses.replace(model.config, tie_embeddings=False))
    params = params | {"head": jax.random.normal(jax.random.PRNGKey(3), (32, V))}
    for position in (0, 7, 15):
        moved = jnp.abs(jax.grad(logit_sum)(jnp.zeros_like(params["embedding"]), position)).sum(-1)[:16]
        assert (moved[: position + 1] > 0).all() and (moved[position + 1 :] == 0).all()


def test_documents_do_not_see_each_other(tokens):
    model, params = make()
    segments = jnp.where(jnp.arange(16) < 6, 0, 1)[None].repeat(2, 0)
    masked, _ = apply(model, params, tokens, segments=segments)
    alone, _ = apply(model, params, tokens[:, 6:])
    together, _ = apply(model, params, tokens)
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
    assert_trees_equal(same, params)
    (loss, grads), (loss2, grads2) = (loss_and_gradients(m, params, tokens) for m in (plain, model))
    np.testing.assert_allclose(loss, loss2, rtol=1e-5)
    assert_trees_close(grads2, grads, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_prefill_and_decode_equal_the_full_forward(tokens, num_kv_heads):
    model, params = make(num_kv_heads=num_kv_heads)
    full, _ = apply(model, params, tokens)
    logits, cache = apply(model, params, tokens[:, :9], cache=Cache.empty(model.config, 2, jnp.float32))
    parts = [logits]
    for t in range(9, 16):
        logits, cache = apply(model, params, tokens[:, t : t + 1], cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=2e-5)
    assert int(cache.length) == 16


def test_one_layer_ring_forgets_what_is_older_than_the_context():
    """Past the context a one-layer model sees exactly the last `seq_len` tokens (deeper ones, further)."""
    model, params = make(num_layers=1)
    tokens = jax.random.randint(jax.random.PRNGKey(4), (1, 25), 0, V)
    cache = Cache.empty(model.config, 1, jnp.float32)
    for t in range(25):
        logits, cache = apply(model, params, tokens[:, t : t + 1], cache=cache)
    window, _ = apply(model, params, tokens[:, -16:])
    np.testing.assert_allclose(logits[:, 0], window[:, -1], atol=2e-5)


def test_logits_at_gives_those_of_one_position(tokens):
    model, params = make()
    full, _ = apply(model, params, tokens)
    one, _ = apply(model, params, tokens, logits_at=jnp.asarray(5))
    np.testing.assert_allclose(one[:, 0], full[:, 5], atol=1e-6)


def test_dropout_repeats_with_its_rng(tokens):
    model, params = make(dropout=0.5)
    dropped = [
        apply(model, params, tokens, deterministic=False, rngs={"dropout": jax.random.PRNGKey(k)})[0] for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert jnp.abs(dropped[0] - dropped[2]).max() > 1e-3


def test_embedding_dropout_drops_ids_wherever_they_stand_and_only_in_training():
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
    full, _ = apply(model, params, tokens)
    narrow, _ = apply(model.clone(dtype=jnp.bfloat16), params, tokens)
    assert narrow.dtype == jnp.bfloat16
    assert jnp.abs(narrow.astype(jnp.float32) - full).max() < 0.1 * jnp.abs(full).max()


def test_counts_by_hand():
    model, params = make(num_kv_heads=2, qk_norm=False)
    by_hand = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32) + V * 32 + 32
    assert count_parameters(params) == by_hand
    products = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + V * 32
    assert flops_per_token(model.config, V) == 6 * products + 6 * 3 * 16 * 32


def test_cudnn_attention_is_the_blocked_one(monkeypatch):
    """In half precision, for plain causal attention only; through JAX's own form of it, since cuDNN needs a GPU."""
    calls = []

    def cudnn_attention(query, key, value):
        calls.append(query.shape)
        return plain(query, key, value, implementation="xla")

    plain = transformer.cudnn_causal_attention
    monkeypatch.setattr(transformer, "cudnn_causal_attention", cudnn_attention)
    shape = {"embed_dim": 64, "num_heads": 4, "num_kv_heads": 2, "seq_len": 32}
    c = dataclasses.replace(make(**shape)[0].config, num_layers=2)
    tokens = jax.random.randint(jax.random.PRNGKey(1), (2, 32), 0, V)
    params = Transformer(c, V).init(jax.random.PRNGKey(0), tokens)["params"]

    def scores(cudnn_attention, dtype, **more):
        model = Transformer(c, V, dtype, cudnn_attention=cudnn_attention)
        return jax.jit(model.apply)({"params": params}, tokens, **more)[0].astype(jnp.float32)

    np.testing.assert_allclose(scores(True, jnp.bfloat16), scores(False, jnp.bfloat16), atol=2e-2)
    taken = len(calls)
    assert taken
    scores(True, jnp.float32)
    scores(True, jnp.bfloat16, segments=tokens * 0)
    scores(True, jnp.bfloat16, cache=Cache.empty(c, 2, jnp.bfloat16))
    assert len(calls) == taken


BOS = 1


def test_losses_of_tokens_are_those_of_their_logits(tokens):
    model, params = make()
    logits, _ = apply(model, params, tokens[:, :-1])
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(token_losses(model, params, tokens, BOS), nats, rtol=1e-4)
    weights = jax.random.uniform(jax.random.PRNGKey(0), nats.shape)
    np.testing.assert_allclose(token_losses(model, params, tokens, BOS, weights), jnp.sum(weights * nats), rtol=1e-5)


def test_losses_of_a_document_do_not_depend_on_the_one_before_where_documents_are_masked(tokens):
    tokens = jnp.where(tokens == BOS, 5, tokens).at[:, 6].set(BOS)
    for mask_documents in (True, False):
        model, params = make(mask_documents=mask_documents)
        both = token_losses(model, params, tokens, BOS)[:, 6:]
        difference = jnp.abs(both - token_losses(model, params, tokens[:, 6:], BOS)).max()
        assert difference < 1e-5 if mask_documents else difference > 1e-2


def test_losses_are_random_with_a_dropout_key_only(tokens):
    model, params = make(dropout=0.5)
    plain, first, again, other = (
        np.asarray(token_losses(model, params, tokens, BOS, dropout_key=key))
        for key in (None, *(jax.random.PRNGKey(seed) for seed in (0, 0, 1)))
    )
    np.testing.assert_allclose(plain, token_losses(make()[0], params, tokens, BOS), rtol=1e-6)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-3 and np.abs(first - other).max() > 1e-3


def test_layers_and_branches_drop_different_elements(tokens, monkeypatch):
    """Each adds noise of its own in place of dropping; of one key the noise would add up to more."""
    added = []

    def note_residual_stream(next_function, arguments, keywords, context):
        if context.module.path == ("final_norm",):
            added.append(np.asarray(arguments[0]))
        return next_function(*arguments, **keywords)

    monkeypatch.setattr(transformer, "dropout", lambda x, rate, key: jax.random.normal(key, x.shape))
    model, params = make(dropout=0.5)
    with nn.intercept_methods(note_residual_stream):
        model.apply({"params": params}, tokens, deterministic=False, rngs={"dropout": jax.random.PRNGKey(0)})
    noises = 1 + 2 * 3  # of the embedding, and of both branches of each layer
    assert 0.8 * noises < np.var(added[0]) < 1.2 * noises


def num_products(remat, scan_layers):
    """Products in the program of a gradient, as it is given to the compiler."""
    model, params = make(remat=remat, scan_layers=scan_layers)
    loss = jax.grad(lambda p, t: jnp.square(model.apply({"params": p}, t)[0]).mean())
    return jax.jit(loss).lower(params, jnp.zeros((2, 16), jnp.int32)).as_text().count("dot_general")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_computes_products_again_that_its_policy_does_not_save(scan_layers):
    kinds = ("none", "everything_saveable", "nothing_saveable", "block")
    none, everything, nothing, block = (num_products(kind, scan_layers) for kind in kinds)
    assert none == everything < nothing == block


def test_the_model_of_a_config_has_its_settings_and_the_kernels_of_the_backend(cpu):
    config = build_config(remat="block")
    for materialize_transposes, cudnn_attention in ((True, False), (False, True)):
        how = {"materialize_transposes": materialize_transposes, "cudnn_attention": cudnn_attention}
        model = make_model(config, dataclasses.replace(cpu, **how), jnp.bfloat16)
        assert model == Transformer(config.model, config.tokenizer.vocab_size, jnp.bfloat16, remat="block", **how)


# The kernels, together, against a model of plain forms, which are what one would write first: `x @ w`, a whole matrix
# of scores, all logits in float32, and every gradient by automatic differentiation.


PLAIN_STEPS = 100


def plain_rms_norm(x, scale, eps):
    y = x.astype(jnp.float32)
    return (y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + eps) * scale).astype(x.dtype)


def plain_attention(query, key, value, mask, materialize_transposes, causal):
    shared = query.shape[1] // key.shape[1]
    key, value = jnp.repeat(key, shared, axis=1), jnp.repeat(value, shared, axis=1)
    scores = jnp.einsum("bnth,bnsh->bnts", query, key).astype(jnp.float32) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bnts,bnsh->bnth", weights.astype(value.dtype), value)


def plain_weighted_cross_entropy(x, table, targets, weights, head):
    logits = (x @ table.T.astype(x.dtype)).astype(jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * chosen)


def make_plain(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(transformer, "rms_norm", plain_rms_norm)
    patch.setattr(transformer, "swiglu", lambda gate, up: jax.nn.silu(gate) * up)
    patch.setattr(transformer, "matmul", lambda x, w, materialize_transposes: x @ w)
    patch.setattr(transformer, "attention", plain_attention)
    patch.setattr(transformer, "weighted_cross_entropy", plain_weighted_cross_entropy)


def losses_and_norms(cpu, dtype) -> np.ndarray:
    """Loss and gradient norm [2, steps] of a small model that learns to go on with a sequence that repeats itself."""
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
        "total_steps": PLAIN_STEPS,
        "batch_size": 4,
    }
    config = build_config(**changes).with_total_steps()
    trainer = make_trainer(config, cpu, dtype, bos_id=1)
    state, rng, found = trainer.init(), np.random.default_rng(0), []
    for _ in range(PLAIN_STEPS):
        again = rng.integers(4, 36, (4, 24), np.int32)
        state, metrics = trainer.step(state, trainer.place(np.tile(again, 9)[:, :193]))
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(found).T


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "allowed"), [(jnp.float32, (1e-5, 1e-3)), (jnp.bfloat16, (1e-2, 5e-2))])
def test_a_hundred_steps_are_those_of_the_plain_forms(cpu, monkeypatch, dtype, allowed):
    fast = losses_and_norms(cpu, dtype)
    with monkeypatch.context() as patch:
        make_plain(patch)
        plain = losses_and_norms(cpu, dtype)
    assert fast[0, -1] < fast[0, 0] - 1  # something was learned
    difference = np.abs(fast / plain - 1).max(axis=1)
    assert (difference > 0).all() and (difference < allowed).all()
