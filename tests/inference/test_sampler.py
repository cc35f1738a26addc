"""The sampler writes what the model says, ends where it should, and passes on only text that cannot change."""

import dataclasses
import functools
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tale_jax.inference.sampler import CHUNK, Sampler, SampleSettings
from tale_jax.inference.sampling import SamplingParams
from tale_jax.model import transformer

CONTEXT = 32  # of the model in conftest.py
PROMPT = "The cat sat"


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


def special_tokens(tokenizer):
    return [tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id]


def sampling_params(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    values = [jnp.float32(temperature), jnp.int32(top_k), *map(jnp.float32, (top_p, min_p, repetition_penalty))]
    return SamplingParams(*values)


def prefill(sampler, ids, rows):
    padded = np.zeros((1, 16 if len(ids) <= 16 else CONTEXT), np.int32)
    padded[0, : len(ids)] = ids
    seen = np.isin(np.arange(sampler.model.vocab_size), ids)
    return sampler.prefill(sampler._weights, padded, np.int32(len(ids)), seen, rows=rows)


def decoded(sampler, ids, rows, chunks=1, **settings):
    """Tokens and log-probabilities [T, B] straight from the compiled programs."""
    state, key, numbers = prefill(sampler, ids, rows), jax.random.PRNGKey(0), np.arange(rows, dtype=np.int32)
    tokens, logprobs = [], []
    for _ in range(chunks):
        state, *sampled = sampler.decode(sampler._weights, state, key, numbers, sampling_params(**settings))
        tokens.append(sampled[0])
        logprobs.append(sampled[1])
    return np.concatenate(tokens), np.concatenate(logprobs)


def greedy_reference(forward, tokenizer, ids, length):
    """The likeliest next token, again and again, by full forward passes; and the log-probability of all of them."""
    ids, total, prompt = list(ids), 0.0, len(ids)
    while len(ids) < prompt + length and ids[-1] != tokenizer.eos_id:
        logits = forward(ids)[-1]
        allowed = logits.copy()
        allowed[special_tokens(tokenizer)] = -np.inf
        ids.append(int(allowed.argmax()))
        total += log_softmax(logits)[ids[-1]]
    return ids[prompt:], total


# What is sampled.


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
    tokens, logprobs = decoded(sampler, ids, rows=2, chunks=5)
    narrow = functools.partial(transformer.causal_mask, window=CONTEXT)
    monkeypatch.setattr(transformer, "causal_mask", narrow)
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
    tokens, logprobs = decoded(sampler, ids, rows=2, temperature=1.7, top_k=20, repetition_penalty=1.3)
    for row in range(2):
        whole = [*ids, *tokens[:, row]]
        expected = log_softmax(forward(whole))[np.arange(len(ids) - 1, len(whole) - 1), tokens[:, row]]
        np.testing.assert_allclose(logprobs[:, row], expected, atol=1e-4)


def test_special_tokens_are_never_sampled_and_every_token_has_numbers_of_its_own(sampler, tiny_model, tokenizer):
    """Weights of zero make all tokens equally likely."""
    flat = Sampler(tiny_model[0], jax.tree_util.tree_map(jnp.zeros_like, tiny_model[1]), tokenizer)
    tokens, logprobs = decoded(flat, [tokenizer.bos_id], rows=2000)
    assert not np.isin(tokens, special_tokens(tokenizer)).any()
    np.testing.assert_allclose(logprobs, -np.log(tokenizer.vocab_size), rtol=1e-5)
    counts = np.bincount(tokens.ravel(), minlength=tokenizer.vocab_size)
    assert np.delete(counts, special_tokens(tokenizer)).min() > 0.5 * tokens.size / tokenizer.vocab_size
    same = np.mean(tokens[:, 0] == tokens[:, 1]), np.mean(tokens[0] == tokens[1])
    assert max(same) < 0.2


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
    together = [delta.sample for delta in sampler.stream_prompts(prompts, settings, seed=5) if delta.sample]
    for number, (prompt, sample) in enumerate(zip(prompts, together, strict=True)):
        alone = sampler.sample(prompt, settings, num_samples=number + 1, seed=5)[number]
        assert sample.text == alone.text, (number, prompt)
        assert sample.logprob == pytest.approx(alone.logprob, abs=1e-3)
    assert len({sample.text for sample in together}) == len(prompts)
    with pytest.raises(ValueError, match="prompts must hold at least one"):
        sampler.stream_prompts([], settings)


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
def test_a_short_text_attends_to_a_short_cache(make_model, tokenizer, dtype):
    model, params = make_model(dtype, seq_len=256)
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


def test_bfloat16_decodes_as_the_full_forward_within_its_rounding(make_model, tokenizer):
    model, params = make_model(jnp.bfloat16)
    sampler = Sampler(model, params, tokenizer)
    tokens, logprobs = decoded(sampler, [tokenizer.bos_id], rows=2)
    whole = np.concatenate([np.full((2, 1), tokenizer.bos_id), tokens.T], axis=1)
    logits, _ = model.apply({"params": params}, jnp.asarray(whole))
    expected = log_softmax(np.asarray(logits, np.float32))[:, np.arange(CHUNK), :]
    expected = np.take_along_axis(expected, tokens.T[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs.T, expected, atol=0.3)
    assert np.abs(logprobs.T - expected).mean() < 0.05


def test_another_shape_of_model_decodes_too(make_model, tokenizer):
    model, params = make_model(scan_layers=True, num_kv_heads=4, tie_embeddings=False)
    sampler = Sampler(model, params, tokenizer, donate=True)
    tokens, logprobs = decoded(sampler, [tokenizer.bos_id], rows=1)
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


def test_weights_that_are_no_numbers_are_write(sampler, tiny_model):
    broken = jax.tree_util.tree_map(lambda x: x * jnp.nan, tiny_model[1])
    with pytest.raises(ValueError, match="finite"):
        sampler.sample("", SampleSettings(), params=broken)


# Where a text ends, and what is passed on before that.


class Scripted(Sampler):
    """Samples given ids, so that the host's side of the sampler can be tested alone."""

    def script(self, ids):
        """From now on, samples these, and then the last of them for ever."""
        self.prefill = lambda *_, **__: 0
        ids = np.pad(ids, (0, -len(ids) % CHUNK + CHUNK), constant_values=ids[-1])

        def decode(_, start, *__):
            return start + CHUNK, ids[start : start + CHUNK, None], np.full((CHUNK, 1), -0.5)

        self.decode = decode


@pytest.fixture
def write(tiny_model, tokenizer):
    sampler = Scripted(tiny_model[0], None, tokenizer)

    def written(text, end=(), **settings):
        """The texts of the deltas while the model writes `text`, and the sample."""
        sampler.script(np.array([*tokenizer.encode(text), *end]))
        deltas = list(sampler.stream("", SampleSettings(**settings)))
        return [delta.text for delta in deltas], deltas[-1].sample

    return written


@pytest.mark.parametrize("before", [*range(CHUNK - 9, CHUNK + 2)])
def test_a_stop_text_is_cut_and_never_shown(write, tokenizer, before):
    text = "q" * before + " The end. And more of it, for as long as it takes to fill a chunk, and another."
    deltas, sample = write(text, stop=("The end.", "never there"))
    assert "".join(deltas) == sample.text == "q" * before + " "
    assert sample.finish_reason == "stop"
    used = tokenizer.encode(text)[: sample.tokens].tolist()
    assert "The end." in tokenizer.decode(used) and "The end." not in tokenizer.decode(used[:-1])
    assert sample.logprob == -0.5 * sample.tokens


def test_the_first_of_several_stop_texts_counts_and_a_false_start_is_passed_on(write, tokenizer):
    text = "A dog The en The hen The end."
    deltas, sample = write(text, stop=("The end.", "hen"))
    assert "".join(deltas) == sample.text == "A dog The en The "
    deltas, sample = write("It was The en", end=[tokenizer.eos_id], stop=("The end.",))
    assert "".join(deltas) == sample.text == "It was The en" and sample.finish_reason == "eos"


@pytest.mark.parametrize("before", [0, 5, CHUNK - 3, CHUNK - 1])
def test_half_a_character_is_never_shown(write, before):
    text = "q" * before + "\U0001f9d9é\u4e16" + "q" * CHUNK
    for length in range(1, before + 12):
        deltas, sample = write(text, max_tokens=length)
        assert "".join(deltas) == sample.text == text[: len(sample.text)]
        assert sample.tokens == length and sample.finish_reason == "length"


def test_eos_ends(write, tokenizer):
    deltas, sample = write("The cat.", end=[tokenizer.eos_id, *tokenizer.encode("more")])
    length = len(tokenizer.encode("The cat.")) + 1
    assert (sample.text, sample.tokens, sample.finish_reason) == ("The cat.", length, "eos")
    assert sample.logprob == -0.5 * length and deltas == ["The cat."]


def test_deltas_come_in_order_and_make_up_the_samples(sampler):
    generation = sampler.stream(PROMPT, SampleSettings(max_tokens=50), num_samples=4)
    texts, order = [""] * 4, []
    for number, text, sample in generation:
        texts[number] += text
        order.append(number)
        assert sample is None or sample.text == texts[number]
    assert order == sorted(order) and len(order) > 4
    assert texts == [sample.text for sample in generation.samples]
    assert generation.tokens_per_second > 0 and generation.seconds > 0


# Mistakes, and long prompts.


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
    with pytest.raises(ValueError, match=rf"^{field}=.* must [^\n]*; try --{field}=[^\n]*$") as raised:
        SampleSettings(**{field: value})
    [told] = shlex.split(str(raised.value).rpartition(f"--{field}=")[2])
    kind = type(getattr(SampleSettings(), field))
    SampleSettings(**{field: (told,) if kind is tuple else kind(told)})


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
