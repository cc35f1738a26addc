"""What is shown is what the forward pass computes: taps, lens, attention and ablation against other ways."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tale_jax.data.token_files import load_tokens
from tale_jax.model.attention import attention, attention_weights, causal_mask, rotary_angles, rotary_frequencies
from tale_jax.model.transformer import Block
from tale_jax.serve.inspect import forward, lens_logits
from tale_jax.serve.models import Variant, ablate, names_of


def some_tokens():
    """Two rows of ids. Not made at import, for JAX must not start before the tests set it."""
    return jnp.asarray(np.random.default_rng(0).integers(4, 500, (2, 24)), jnp.int32)


@pytest.fixture(scope="module")
def decoder(model):
    return model.model


@pytest.fixture(scope="module")
def params(model):
    noise = np.random.default_rng(1)  # two output projections begin as zeros, and 20 steps leave them small
    return jax.tree_util.tree_map(
        lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), model.params(model.default)
    )


def test_taps_leave_the_plain_program_as_it_is(decoder, params, monkeypatch):
    def plain(params):
        return decoder.apply({"params": params}, some_tokens())[0]

    with_sow = str(jax.make_jaxpr(plain)(params))
    monkeypatch.setattr(nn.Module, "sow", lambda *_, **__: True)
    assert str(jax.make_jaxpr(plain)(params)) == with_sow


def test_tapped_logits_are_the_plain_ones_to_the_bit(decoder, params):
    plain = jax.jit(lambda params: decoder.apply({"params": params}, some_tokens())[0])(params)
    tapped = jax.jit(lambda params: forward(decoder, params, some_tokens())[0])(params)
    np.testing.assert_array_equal(plain, tapped)


def test_the_lens_of_the_last_layer_is_the_model(decoder, params):
    logits, taps = forward(decoder, params, some_tokens())
    states = taps["blocks"]["residual"][0]
    assert states.shape == (decoder.config.num_layers, *some_tokens().shape, decoder.config.embed_dim)
    np.testing.assert_array_equal(lens_logits(decoder, params, states[-1]), logits)
    scale = decoder.config.embed_dim**0.5 if decoder.config.scale_embeddings else 1
    np.testing.assert_allclose(taps["embedded"][0], params["embedding"][some_tokens()] * scale, rtol=1e-6)


def test_attention_weights_mix_the_values_as_attention_does():
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(2, 4, 9, 8)), jnp.float32)
    key, value = (jnp.asarray(rng.normal(size=(2, 2, 9, 8)), jnp.float32) for _ in range(2))
    mask = jnp.tril(jnp.ones((1, 9, 9), bool))
    weights = attention_weights(query, key, mask)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
    assert (np.triu(np.asarray(weights), 1) == 0).all()
    mixed = jnp.einsum("bnts,bnsh->bnth", weights, jnp.repeat(value, 2, axis=1))
    np.testing.assert_allclose(mixed, attention(query, key, value, mask, causal=True), atol=1e-5)


def test_an_ablated_head_is_one_whose_output_is_zero(decoder, params):
    """Against the pass in which what the output projection reads of that head is zero."""
    layer, head, width = 1, 1, decoder.config.head_dim
    plain = decoder.clone(config=dataclasses.replace(decoder.config, scan_layers=False))
    layers = itertools.count()

    def intercept(next_call, arguments, options, context):
        if context.module.name == "output" and next(layers) % decoder.config.num_layers == layer:
            heads = arguments[0].reshape(*some_tokens().shape, -1, width).at[:, :, head].set(0)
            arguments = (heads.reshape(arguments[0].shape), *arguments[1:])
        return next_call(*arguments, **options)

    full = plain.apply({"params": params}, some_tokens())[0]
    with nn.intercept_methods(intercept):
        expected = layers_one_by_one(plain, params)
    ablated = plain.apply({"params": ablate(params, [(layer, head)], [], width)}, some_tokens())[0]
    np.testing.assert_allclose(ablated, expected, atol=1e-5)
    assert not np.allclose(full, ablated, atol=1e-3)


def layers_one_by_one(decoder, params):
    """Logits by calling each block by itself, so that a method of one layer can be told from another's."""
    c = decoder.config
    positions = jnp.broadcast_to(jnp.arange(some_tokens().shape[1], dtype=jnp.int32), some_tokens().shape)
    mask = causal_mask(positions, positions)
    angles = rotary_angles(positions, rotary_frequencies(c.head_dim, c.rope_base))
    x = params["embedding"][some_tokens()] * (c.embed_dim**0.5 if c.scale_embeddings else 1)
    block = Block(c, decoder.dtype, decoder.materialize_transposes, True)
    for layer in range(c.num_layers):
        weights = jax.tree_util.tree_map(lambda w, layer=layer: w[layer], params["blocks"])
        x, _ = block.apply({"params": weights}, x, angles, mask, jnp.zeros((), jnp.int32), None)
    return lens_logits(decoder, params, x)


def test_an_ablated_layer_adds_nothing(decoder, params):
    taps = forward(decoder, ablate(params, [], [1], decoder.config.head_dim), some_tokens())[1]
    states = taps["blocks"]["residual"][0]
    np.testing.assert_array_equal(states[1], states[0])


def test_names_of_folders(tmp_path):
    folders = [tmp_path / "tales", tmp_path / "x" / "tales", tmp_path / "y" / "tales", tmp_path / "wiki"]
    assert names_of(folders) == ["tales", "tales-2", "tales-3", "wiki"]


# Over HTTP.


def text_and_ids(model, number=0):
    tokens, _ = load_tokens(model.workdir, "valid")
    starts = np.flatnonzero(np.asarray(tokens) == model.tokenizer.bos_id)
    ids = np.asarray(tokens[starts[number] : starts[number + 1]]).tolist()
    return model.tokenizer.decode(ids), ids


def test_tokens(client, model):
    text, ids = text_and_ids(model)
    answer = client.post("/inspect/tokens", json={"prompt": ids[:60], "top": 20, "temperature": 0.5, "top_k": 7}).json()
    assert [token["id"] for token in answer["tokens"]] == ids[:60] and len(answer["positions"]) == 60
    logits, _ = model.model.apply({"params": model.params(model.default)}, jnp.asarray([ids[:60]], jnp.int32))
    logprobs = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)), np.float64)
    expected = -logprobs[np.arange(59), ids[1:60]].sum()
    assert answer["nats"] == pytest.approx(expected, abs=1e-3)
    for position in answer["positions"]:
        kept = [np.exp(t["logprob_after"]) for t in position["top"] if t["logprob_after"] is not None]
        assert len(kept) == 7 and sum(kept) == pytest.approx(1, abs=1e-5)
    assert answer["positions"][-1]["token"] is None
    assert text.startswith("".join(token["text"] for token in answer["tokens"][1:20]))


def test_attention_is_causal_and_sums_to_one(client, model):
    answer = client.post("/inspect/attention", json={"prompt": "Once there was a fox", "layer": 1}).json()
    assert len(answer["heads"]) == model.config.model.num_heads
    for head in answer["heads"]:
        for number, row in enumerate(head["weights"]):
            assert len(row) == number + 1 and sum(row) == pytest.approx(1, abs=1e-2)
    one = client.post("/inspect/attention", json={"prompt": "Once there was a fox", "layer": 1, "head": 1}).json()
    assert one["heads"] == [answer["heads"][1]]


def test_lens_ends_in_what_the_model_says(client):
    body = {"prompt": "Once there was", "top": 3}
    lens, tokens = client.post("/inspect/lens", json=body).json(), client.post("/inspect/tokens", json=body).json()
    for shown, position in zip(lens["layers"][-1]["positions"], tokens["positions"], strict=True):
        assert [t["id"] for t in shown["top"]] == [t["id"] for t in position["top"]]
        assert shown["top"][0]["logprob"] == pytest.approx(position["top"][0]["logprob"], abs=1e-4)


def test_steps_and_ablations_change_what_is_written_and_scored(client):
    base = {"prompt": "Once there was", "max_tokens": 30, "seed": 3, "logprobs": 0}
    variants = [
        {},
        {"step": 20},
        {"step": 10},
        {"ablate": {"layers": [0]}},
        {"step": 10, "ablate": {"heads": [[0, 1]]}},
    ]
    choices = [client.post("/v1/completions", json=base | more).json()["choices"][0] for more in variants]
    scores = [tuple(choice["logprobs"]["token_logprobs"]) for choice in choices]
    assert choices[0] == choices[1] and len(set(scores)) == 4
    nats = [
        client.post("/inspect/tokens", json={"prompt": "Once there was a girl named Ada", **more}).json()["nats"]
        for more in ({}, {"step": 10}, {"ablate": {"layers": [0, 1]}})
    ]
    assert len(set(nats)) == 3
    for more, field in (
        ({"step": 11}, "step"),
        ({"ablate": {"heads": [[0, 99]]}}, "ablate"),
        ({"ablate": {"layers": [7]}}, "ablate"),
        ({"ablate": {"norms": [7]}}, "ablate"),
    ):
        done = client.post("/v1/completions", json=base | more)
        assert done.status_code == 400 and done.json()["error"]["param"] == field


def test_what_is_known_of_the_run(client):
    about = client.get("/inspect/model").json()
    assert about["layers"] == 2 and about["step"] == 20 and about["judge"]
    found = client.get("/inspect/checkpoints?model=chatty").json()
    assert [c["step"] for c in found["checkpoints"]] == [10, 20] and found["default"] == 20
    assert all(c["nats_per_token"] > 0 for c in found["checkpoints"])
    losses = client.get("/inspect/losses").json()
    assert losses["train"]["steps"][-1] == 20 and losses["floor_nats_per_token"] > 0
    assert client.get("/inspect/losses?modle=x").status_code == 400
    assert client.get("/inspect/losses?model=x").status_code == 404


def test_a_tale_is_judged(client, model):
    text, _ = text_and_ids(model)
    verdict = client.post("/inspect/judge", json={"text": text}).json()
    assert verdict["accepted"] and 0 < verdict["nats_per_token"] < 1
    verdict = client.post("/inspect/judge", json={"text": "I am no tale."}).json()
    assert not verdict["accepted"] and verdict["reason"] and verdict["nats"] is None


def test_the_variants_in_memory_are_bounded(model):
    from tale_jax.serve.models import MAX_VARIANTS

    for head in range(2):
        for layer in range(2):
            for step in (10, 20):
                model.params(Variant(step, ((layer, head),)))
                model.params(Variant(step, (), (layer,)))
    assert len(model._cache) <= MAX_VARIANTS
