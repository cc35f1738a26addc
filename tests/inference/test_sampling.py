"""One token is sampled with the probabilities that penalty, temperature and filters leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tale_jax.inference.sampling import SamplingParams, filter_logits, penalize, sample_token


def sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    values = [jnp.float32(temperature), jnp.int32(top_k), *map(jnp.float32, (top_p, min_p, repetition_penalty))]
    return SamplingParams(*values)


def softmax(x):
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


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
        np.testing.assert_allclose(softmax(filtered[row]), expected, atol=2e-6, rtol=1e-4)
        assert ((filtered[row] > -np.inf) == (expected > 0))[expected > 1e-30].all()


def test_filters_keep_what_ties_and_always_something():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    kept = filter_logits(logits, jnp.zeros((2, 4), bool), sampling(top_k=1)) > -jnp.inf
    np.testing.assert_array_equal(kept, [[False, True, True, False], [True, True, True, True]])
    kept = filter_logits(logits, jnp.zeros((2, 4), bool), sampling(temperature=1e-30, top_p=1e-9, min_p=1.0)) > -jnp.inf
    np.testing.assert_array_equal(kept, [[False, True, True, False], [True, True, True, True]])


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "top_p": 0.8}, {"top_k": 7, "min_p": 0.05}], ids=str)
def test_frequencies_are_the_probabilities(settings):
    rows, logits = 20_000, np.random.default_rng(0).normal(size=50).astype(np.float32) * 2
    logits[:3], seen = -np.inf, np.zeros(50, bool)
    keys = jax.random.split(jax.random.PRNGKey(0), rows)
    tokens = sample_token(jnp.tile(logits, (rows, 1)), jnp.tile(seen, (rows, 1)), sampling(**settings), keys)[0]
    expected = rows * reference(logits, seen, **settings)
    observed = np.bincount(tokens, minlength=50)
    assert observed[expected == 0].sum() == 0
    common = expected > 5
    pairs = [(observed[common], expected[common])]
    if (rest := expected[~common].sum()) > 5:
        pairs.append((observed[~common].sum(keepdims=True), np.array([rest])))
    chi2 = sum(((o - e) ** 2 / e).sum() for o, e in pairs)
    freedom = sum(len(o) for o, _ in pairs) - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 0.0, "top_p": 0.5}], ids=str)
def test_greedy_takes_the_first_of_the_most_likely(settings):
    logits = jnp.array([[1.0, 5.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0], [9.0, -1.0, 0.0, 8.9]])
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    tokens = sample_token(logits, jnp.zeros((3, 4), bool), sampling(**settings), keys)[0]
    np.testing.assert_array_equal(tokens, [1, 0, 0])


def test_the_penalty_counts_where_greedy_decides():
    logits, seen = jnp.array([[2.0, 1.9, -1.0]]), jnp.array([[True, False, False]])
    settings = sampling(temperature=0.0, repetition_penalty=1.2)
    token, _ = sample_token(logits, seen, settings, jax.random.split(jax.random.PRNGKey(0), 1))
    assert token.tolist() == [1]


def test_every_row_may_have_settings_of_its_own_and_none_changes_another():
    """Rows with all kinds of settings together, and each one alone: equal bits."""
    rng = np.random.default_rng(0)
    kinds = [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5, "temperature": 0.7}, {"min_p": 0.1}, {"top_k": 1}]
    rows = len(kinds)
    logits, seen = jnp.asarray(rng.normal(size=(rows, 90)), jnp.float32), jnp.asarray(rng.random((rows, 90)) < 0.2)
    counts, keys = jnp.asarray(rng.integers(0, 3, (rows, 90)), jnp.int32), jax.random.split(jax.random.PRNGKey(0), rows)
    numbers = [sampling(**kind, repetition_penalty=1 + 0.1 * row) for row, kind in enumerate(kinds)]
    more = {
        "frequency_penalty": jnp.linspace(-1, 1, rows),
        "presence_penalty": jnp.linspace(1, -1, rows),
        "logit_bias": jnp.asarray(rng.normal(size=(rows, 90)), jnp.float32),
    }
    together = SamplingParams(*(jnp.stack(x) for x in zip(*(n[:5] for n in numbers), strict=True)), **more)
    tokens, filtered = jax.jit(sample_token)(logits, seen, together, keys, counts)
    quiet = sampling(temperature=0.0)
    for row in range(rows):
        # The same row among rows that ask for nothing.
        alone = [jnp.full((rows,), value).at[row].set(n) for value, n in zip(quiet[:5], numbers[row][:5], strict=True)]
        token, kept = jax.jit(sample_token)(logits, seen, SamplingParams(*alone, **more), keys, counts)
        assert token[row] == tokens[row]
        np.testing.assert_array_equal(kept[row], filtered[row])


def test_bias_and_penalties_are_the_sums_they_say():
    logits, seen = jnp.array([[2.0, -1.0, 0.5, 3.0]]), jnp.array([[True, True, False, False]])
    settings = sampling(repetition_penalty=2.0)._replace(
        frequency_penalty=jnp.array([0.5]), presence_penalty=jnp.array([0.25]), logit_bias=jnp.array([[0.0, 0, 1, -9]])
    )
    counts = jnp.array([[0, 3, 1, 0]], jnp.int32)
    np.testing.assert_allclose(penalize(logits, seen, settings, counts), [[1.0, -2 - 1.75, 1.5 - 0.75, -6]])
    np.testing.assert_allclose(penalize(logits, seen, settings._replace(logit_bias=None)), [[1.0, -2.0, 0.5, 3.0]])
