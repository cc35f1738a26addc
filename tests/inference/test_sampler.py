"""Properties of the sampler: it draws what the model says, ends where it should, and passes on only what is settled."""

import dataclasses
import functools
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_config
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tale_jax.data.tokenizer import train_tokenizer
from tale_jax.inference.chat import converse
from tale_jax.inference.sampler import CHUNK, Sampler, SampleSettings
from tale_jax.inference.sampling import SamplingParams, filter_logits
from tale_jax.model import layers as ops
from tale_jax.model.transformer import Transformer

CONTEXT = 32
PROMPT = "The cat sat"


@pytest.fixture(scope="module")
def tokenizer():
    config = dataclasses.replace(build_config().tokenizer, vocab_size=320)
    tales = [f"The cat sat on mat {i}, and the dog and the hen saw the cat. The end.\n" for i in range(200)]
    return train_tokenizer(tales, config)


def make(tokenizer, dtype=jnp.float32, **changes):
    """A tiny model with every weight random, large enough that some tokens are much likelier than others."""
    names = {"num_layers": 2, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48, "seq_len": CONTEXT}
    model = Transformer(dataclasses.replace(build_config().model, **(names | changes)), tokenizer.vocab_size, dtype)
    params = model.init(jax.random.PRNGKey(0), jnp.zeros((1, 4), jnp.int32))["params"]
    leaves, tree = jax.tree_util.tree_flatten(params)
    keys = jax.random.split(jax.random.PRNGKey(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return model, jax.tree_util.tree_unflatten(tree, noisy)


@pytest.fixture(scope="module")
def tiny_model(tokenizer):
    return make(tokenizer)


@pytest.fixture(scope="module")
def sampler(tiny_model, tokenizer):
    return Sampler(*tiny_model, tokenizer)


@pytest.fixture(scope="module")
def forward(tiny_model):
    """Logits [T, V] of ids [T], computed in one pass without a cache."""
    model, params = tiny_model
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens)[0])

    def logits(ids):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(apply(padded)[0, : len(ids)], np.float64)

    return logits


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def marks(tokenizer):
    return [tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id]


def sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    values = [jnp.float32(temperature), jnp.int32(top_k), *map(jnp.float32, (top_p, min_p, repetition_penalty))]
    return SamplingParams(*values)


def prefill(sampler, ids, rows):
    padded = np.zeros((1, 16 if len(ids) <= 16 else CONTEXT), np.int32)
    padded[0, : len(ids)] = ids
    seen = np.isin(np.arange(sampler.model.vocab_size), ids)
    return sampler.prefill(sampler._weights, padded, np.int32(len(ids)), seen, rows=rows)


def sample_token(sampler, ids, rows, chunks=1, **settings):
    """Tokens and log-probabilities [T, B] straight from the compiled programs."""
    state, key, numbers = prefill(sampler, ids, rows), jax.random.PRNGKey(0), np.arange(rows, dtype=np.int32)
    tokens, logprobs = [], []
    for _ in range(chunks):
        state, *drawn = sampler.decode(sampler._weights, state, key, numbers, sampling(**settings))
        tokens.append(drawn[0])
        logprobs.append(drawn[1])
    return np.concatenate(tokens), np.concatenate(logprobs)


def greedy_reference(forward, tokenizer, ids, length):
    """The likeliest next token, again and again, by full forward passes; and the log-probability of all of them."""
    ids, total, prompt = list(ids), 0.0, len(ids)
    while len(ids) < prompt + length and ids[-1] != tokenizer.eos_id:
        logits = forward(ids)[-1]
        allowed = logits.copy()
        allowed[marks(tokenizer)] = -np.inf
        ids.append(int(allowed.argmax()))
        total += log_softmax(logits)[ids[-1]]
    return ids[prompt:], total


# What is drawn.


def test_greedy_is_the_argmax_of_the_full_forward(sampler, tokenizer, forward):
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    expected, logprob = greedy_reference(forward, tokenizer, ids, CONTEXT - len(ids))
    [sample] = sampler.sample(PROMPT, SampleSettings(max_tokens=CONTEXT - len(ids), temperature=0.0))
    assert sample.text == tokenizer.decode(expected)
    assert sample.tokens == len(expected)
    assert sample.logprob == pytest.approx(logprob, abs=1e-3)


def test_text_outgrows_the_context_as_under_a_sliding_window(sampler, tiny_model, tokenizer, monkeypatch):
    model, params = tiny_model
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    tokens, logprobs = sample_token(sampler, ids, rows=2, chunks=5)
    monkeypatch.setattr(ops, "causal_mask", functools.partial(ops.causal_mask, window=CONTEXT))
    whole = np.concatenate([np.tile(ids, (2, 1)), tokens.T], axis=1)
    assert whole.shape[1] > 2 * CONTEXT
    logits, _ = model.apply({"params": params}, jnp.asarray(whole))
    expected = np.take_along_axis(log_softmax(np.asarray(logits))[:, :-1], whole[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs.T, expected[:, len(ids) - 1 :], atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, CONTEXT])
def test_prefill_does_not_see_its_padding(sampler, forward, length):
    ids = np.random.default_rng(length).integers(4, sampler.model.vocab_size, length)
    np.testing.assert_allclose(prefill(sampler, ids, rows=1).logits[0], forward(ids)[-1], atol=1e-4)


def test_logprobs_are_the_model_s_own_whatever_the_settings(sampler, tokenizer, forward):
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    tokens, logprobs = sample_token(sampler, ids, rows=2, temperature=1.7, top_k=20, repetition_penalty=1.3)
    for row in range(2):
        whole = [*ids, *tokens[:, row]]
        expected = log_softmax(forward(whole))[np.arange(len(ids) - 1, len(whole) - 1), tokens[:, row]]
        np.testing.assert_allclose(logprobs[:, row], expected, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "top_p": 0.8}, {"top_k": 7, "min_p": 0.05}])
def test_frequencies_are_the_probabilities(sampler, tokenizer, forward, settings):
    rows, ids = 4000, [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    tokens, _ = sample_token(sampler, ids, rows=rows, **settings)
    assert not np.isin(tokens, marks(tokenizer)).any()
    logits = forward(ids)[-1]
    logits[marks(tokenizer)] = -np.inf
    expected = rows * reference(logits, np.zeros(len(logits), bool), **settings)
    observed = np.bincount(tokens[0], minlength=len(logits))
    assert observed[expected == 0].sum() == 0
    common = expected > 5
    pairs = [(observed[common], expected[common])]
    if (rest := expected[~common].sum()) > 5:
        pairs.append((observed[~common].sum(keepdims=True), np.array([rest])))
    chi2 = sum(((o - e) ** 2 / e).sum() for o, e in pairs)
    freedom = sum(len(o) for o, _ in pairs) - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def reference(logits, seen, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Probabilities after penalty, temperature and filters, by sorting, in numpy and float64."""
    x = logits.astype(np.float64)
    x = np.where(seen, np.where(x > 0, x / repetition_penalty, x * repetition_penalty), x) / temperature
    order = np.argsort(-x)
    p = np.exp(x[order] - x[order[0]])
    if top_k:
        p[top_k:] = 0
    p /= p.sum()
    p[np.cumsum(p) - p >= top_p] = 0
    p[p < min_p * p[0]] = 0
    result = np.zeros_like(p)
    result[order] = p / p.sum()
    return result


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 10_000},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7},
        {"temperature": 1.6, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_filters_agree_with_a_reference_that_sorts(settings, scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(8, 300))).astype(np.float32)
    logits[:, :3] = -np.inf
    seen = rng.random(logits.shape) < 0.2
    filtered = np.asarray(jax.jit(filter_logits)(logits, seen, sampling(**settings)), np.float64)
    for row in range(len(logits)):
        expected = reference(logits[row], seen[row], **settings)
        np.testing.assert_allclose(np.exp(log_softmax(filtered[row])), expected, atol=2e-6, rtol=1e-4)
        assert ((filtered[row] > -np.inf) == (expected > 0))[expected > 1e-30].all()


def test_filters_keep_what_ties_and_always_something():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    kept = filter_logits(logits, jnp.zeros((2, 4), bool), sampling(top_k=1)) > -jnp.inf
    np.testing.assert_array_equal(kept, [[False, True, True, False], [True, True, True, True]])
    kept = filter_logits(logits, jnp.zeros((2, 4), bool), sampling(temperature=1e-30, top_p=1e-9, min_p=1.0)) > -jnp.inf
    np.testing.assert_array_equal(kept, [[False, True, True, False], [True, True, True, True]])


# Seeds, batches and programs.


def test_a_seed_gives_the_same_samples_however_many_there_are(sampler, tiny_model, tokenizer):
    settings = SampleSettings(max_tokens=20)
    four = sampler.sample(PROMPT, settings, num_samples=4, seed=7)
    assert four == sampler.sample(PROMPT, settings, num_samples=4, seed=7)
    assert len({sample.text for sample in four}) == 4
    texts = [sample.text for sample in four]
    for number in (1, 2):
        assert [s.text for s in sampler.sample(PROMPT, settings, num_samples=number, seed=7)] == texts[:number]
    in_groups = Sampler(*tiny_model, tokenizer, batch_size=3)
    assert [s.text for s in in_groups.sample(PROMPT, settings, num_samples=4, seed=7)] == texts
    assert {sample.text for sample in sampler.sample(PROMPT, settings, num_samples=4, seed=8)}.isdisjoint(texts)
    sampler.sample(PROMPT, settings, seed=2**32 - 1)


def test_prompts_of_their_own_are_followed_as_if_each_stood_alone(tiny_model, tokenizer):
    sampler, settings = Sampler(*tiny_model, tokenizer, batch_size=4), SampleSettings(max_tokens=12)
    prompts = ["The cat sat", "", "and the dog saw the hen. The", "hen", "mat 7", "The cat sat"]
    together = [piece.sample for piece in sampler.stream_each(prompts, settings, seed=5) if piece.sample]
    for number, (prompt, sample) in enumerate(zip(prompts, together, strict=True)):
        alone = sampler.sample(prompt, settings, num_samples=number + 1, seed=5)[number]
        assert sample.text == alone.text, (number, prompt)
        assert sample.logprob == pytest.approx(alone.logprob, abs=1e-3)
    assert len({sample.text for sample in together}) == len(prompts)
    with pytest.raises(ValueError, match="prompts must hold at least one"):
        sampler.stream_each([], settings)


def test_top_k_of_one_is_greedy_even_where_tokens_tie(sampler, tiny_model):
    flat = jax.tree_util.tree_map(jnp.zeros_like, tiny_model[1])  # all tokens are equally likely
    likeliest = sampler.sample(PROMPT, SampleSettings(max_tokens=20, temperature=0.0), params=flat)
    settings = SampleSettings(max_tokens=20, temperature=2.0, top_k=1)
    assert sampler.sample(PROMPT, settings, seed=3, params=flat) == likeliest


def test_nothing_compiles_twice(tiny_model, tokenizer):
    sampler = Sampler(*tiny_model, tokenizer)
    for seed, prompt in enumerate(["", "The cat", "The dog and the hen saw", "a"]):
        for number, changes in enumerate(
            [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 2.0}]
        ):
            settings = SampleSettings(max_tokens=3 + 20 * (number == 2), **changes)
            sampler.sample(prompt, settings, seed=seed, num_samples=3 + number % 2)
    assert (sampler.prefill._cache_size(), sampler.decode._cache_size()) == (1, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_short_text_looks_at_a_short_cache(tokenizer, dtype):
    model, params = make(tokenizer, dtype, seq_len=256)
    sampler = Sampler(model, params, tokenizer)
    used = []
    sampler.prefill, prefill = lambda *a, **how: used.append(how) or prefill(*a, **how), sampler.prefill
    settings = SampleSettings(max_tokens=40, temperature=0.0)
    [short] = sampler.sample(PROMPT, settings)
    [long] = sampler.sample(PROMPT, dataclasses.replace(settings, max_tokens=200))
    assert [how["slots"] for how in used] == [64, 256]
    if dtype == jnp.float32:
        assert long.text.startswith(short.text)
    assert {how["rows"] for how in used} == {1 if dtype == jnp.float32 else 2}


def test_bfloat16_decodes_as_the_full_forward_within_its_rounding(tokenizer):
    model, params = make(tokenizer, jnp.bfloat16)
    sampler = Sampler(model, params, tokenizer)
    tokens, logprobs = sample_token(sampler, [tokenizer.bos_id], rows=2)
    whole = np.concatenate([np.full((2, 1), tokenizer.bos_id), tokens.T], axis=1)
    logits, _ = model.apply({"params": params}, jnp.asarray(whole))
    expected = log_softmax(np.asarray(logits, np.float32))[:, np.arange(CHUNK), :]
    expected = np.take_along_axis(expected, tokens.T[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs.T, expected, atol=0.3)
    assert np.abs(logprobs.T - expected).mean() < 0.05


def test_another_shape_of_model_decodes_too(tokenizer):
    model, params = make(tokenizer, scan_layers=True, num_kv_heads=4, tie_embeddings=False)
    sampler = Sampler(model, params, tokenizer, donate=True)
    tokens, logprobs = sample_token(sampler, [tokenizer.bos_id], rows=1)
    whole = np.concatenate([[tokenizer.bos_id], tokens[:, 0]])[None]
    logits, _ = model.apply({"params": params}, jnp.asarray(whole))
    expected = log_softmax(np.asarray(logits[0]))[np.arange(CHUNK), tokens[:, 0]]
    np.testing.assert_allclose(logprobs[:, 0], expected, atol=1e-4)


def test_weights_may_be_spread_over_devices_and_come_with_the_call(tiny_model, sampler, tokenizer):
    model, params = tiny_model
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    spread = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    spread["embedding"] = jax.device_put(params["embedding"], NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    settings = SampleSettings(max_tokens=20)
    samples = Sampler(model, None, tokenizer).sample(PROMPT, settings, num_samples=2, params=spread)
    assert [s.text for s in samples] == [s.text for s in sampler.sample(PROMPT, settings, num_samples=2)]


def test_weights_that_are_no_numbers_are_told(sampler, tiny_model):
    broken = jax.tree_util.tree_map(lambda x: x * jnp.nan, tiny_model[1])
    with pytest.raises(ValueError, match="finite"):
        sampler.sample("", SampleSettings(), params=broken)


# Where a text ends, and what is passed on before.


class Scripted(Sampler):
    """Draws given ids, so that the host's side of the sampler can be watched."""

    def script(self, ids):
        """From now on, draws these, and then the last of them for ever."""
        self.prefill = lambda *_, **__: 0
        ids = np.pad(ids, (0, -len(ids) % CHUNK + CHUNK), constant_values=ids[-1])

        def decode(_, start, *__):
            return start + CHUNK, ids[start : start + CHUNK, None], np.full((CHUNK, 1), -0.5)

        self.decode = decode


@pytest.fixture
def told(tiny_model, tokenizer):
    sampler = Scripted(tiny_model[0], None, tokenizer)

    def tell(text, end=(), **settings):
        """The texts of the pieces of a generation that draws `text`, and the sample."""
        sampler.script(np.array([*tokenizer.encode(text), *end]))
        pieces = list(sampler.stream("", SampleSettings(**settings)))
        return [piece.text for piece in pieces], pieces[-1].sample

    return tell


@pytest.mark.parametrize("before", [*range(CHUNK - 9, CHUNK + 2)])
def test_a_stop_text_is_cut_and_never_shown(told, tokenizer, before):
    text = "q" * before + " The end. And more of it, for as long as it takes to fill a chunk, and another."
    pieces, sample = told(text, stop=("The end.", "never there"))
    assert "".join(pieces) == sample.text == "q" * before + " "
    assert sample.finished == "stop"
    drawn = tokenizer.encode(text)[: sample.tokens]
    assert "The end." in tokenizer.decode(drawn) and "The end." not in tokenizer.decode(drawn[:-1])
    assert sample.logprob == -0.5 * sample.tokens


def test_the_first_of_several_stop_texts_counts_and_a_false_start_is_passed_on(told, tokenizer):
    text = "A dog The en The hen The end."
    pieces, sample = told(text, stop=("The end.", "hen"))
    assert "".join(pieces) == sample.text == "A dog The en The "
    pieces, sample = told("It was The en", end=[tokenizer.eos_id], stop=("The end.",))
    assert "".join(pieces) == sample.text == "It was The en" and sample.finished == "eos"


@pytest.mark.parametrize("before", [0, 5, CHUNK - 3, CHUNK - 1])
def test_half_a_character_is_never_shown(told, before):
    text = "q" * before + "\U0001f9d9é\u4e16" + "q" * CHUNK
    for length in range(1, before + 12):
        pieces, sample = told(text, max_tokens=length)
        assert "".join(pieces) == sample.text == text[: len(sample.text)]
        assert sample.tokens == length and sample.finished == "length"


def test_the_end_mark_ends(told, tokenizer):
    pieces, sample = told("The cat.", end=[tokenizer.eos_id, *tokenizer.encode("more")])
    length = len(tokenizer.encode("The cat.")) + 1
    assert (sample.text, sample.tokens, sample.finished) == ("The cat.", length, "eos")
    assert sample.logprob == -0.5 * length and pieces == ["The cat."]


def test_pieces_come_in_order_and_make_up_the_samples(sampler):
    generation = sampler.stream(PROMPT, SampleSettings(max_tokens=50), num_samples=4)
    texts, order = [""] * 4, []
    for number, text, sample in generation:
        texts[number] += text
        order.append(number)
        assert sample is None or sample.text == texts[number]
    assert order == sorted(order) and len(order) > 4
    assert texts == [sample.text for sample in generation.samples]
    assert generation.tokens_per_second > 0 and generation.seconds > 0


# What the user says, and what is said back.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p", 1.5),
        ("top_p", 0.0),
        ("top_p", float("nan")),
        ("temperature", -1.0),
        ("temperature", float("inf")),
        ("min_p", -0.1),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("long_prompt", "cut"),
    ],
)
def test_a_setting_out_of_range_is_one_line_with_a_remedy(field, value):
    with pytest.raises(ValueError, match=rf"^{field}=.* must [^\n]*; try --{field}=[^\n]*$"):
        SampleSettings(**{field: value})


@pytest.mark.parametrize(
    ("prompt", "arguments", "said"),
    [
        (" \n\t", {}, "prompt=' \\n\\t' must hold more than whitespace"),
        ("x", {"num_samples": 0}, "num_samples=0 must be at least 1"),
        ("x", {"seed": -1}, "seed=-1 must be at least 0"),
        ("q" * CONTEXT, {}, "prompt of 32 tokens must fit the context of 32"),
    ],
)
def test_a_bad_call_is_one_line_at_once(sampler, prompt, arguments, said):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        sampler.stream(prompt, SampleSettings(), **arguments)
    assert str(error.value).startswith(said)


def test_a_long_prompt_may_be_read_from_its_end(sampler, tokenizer):
    prompt = "q" * 100 + PROMPT
    generation = sampler.stream(prompt, SampleSettings(max_tokens=10, long_prompt="window"))
    assert generation.ids == tokenizer.encode(prompt).tolist()[-CONTEXT * 3 // 4 :]
    assert len(list(generation)) > 0
    short = sampler.stream(PROMPT, SampleSettings(max_tokens=10, long_prompt="window"))
    assert short.ids == [tokenizer.bos_id, *tokenizer.encode(PROMPT)]


def test_show_prints_texts_or_one_json_object(sampler, capsys):
    settings = SampleSettings(max_tokens=20)
    show(sampler.stream(PROMPT, settings, num_samples=2, seed=5))
    shown = capsys.readouterr().out
    show(sampler.stream(PROMPT, settings, num_samples=2, seed=5), as_json=True, step=3)
    result = json.loads(capsys.readouterr().out)
    assert shown == "".join(f"[{i + 1}/2] {PROMPT}{sample['text']}\n" for i, sample in enumerate(result["samples"]))
    assert set(result["samples"][0]) == {"text", "tokens", "logprob", "finished"}
    assert result["tokens_per_second"] > 0 and result["step"] == 3 and result["prompt"] == PROMPT


def test_a_conversation_outlives_a_bad_prompt(sampler, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The cat\n   \nThe dog\n\nnot read\n"))
    stream = functools.partial(sampler.stream, settings=SampleSettings(max_tokens=5))
    converse(stream, show)
    out, err = capsys.readouterr()
    assert out.startswith("The cat") and "\nThe dog" in out and "not read" not in out
    assert err == "error: prompt='   ' must hold more than whitespace; leave it out to start a document\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("The cat"))
    converse(stream, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert capsys.readouterr().out == " [stopped]\n"
