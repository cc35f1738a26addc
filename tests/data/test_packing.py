"""Conversations in windows: none is cut, little is padding, and the loss is that of each alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import build_config
from hypothesis import given, settings
from hypothesis import strategies as st

from tale_jax.data.marks import ALL_LEARNED, DTYPE, FIRST, LEARNED, MARKED, is_learned, token_ids
from tale_jax.data.packing import OPEN_WINDOWS, PackedWindows, first_fit, training_windows
from tale_jax.model.transformer import make_model, token_losses

PAD = 3


def stream(lengths, seed=0):
    """Conversations of these lengths: BOS, then tokens of which about half are learned, the last one surely."""
    rng, parts = np.random.default_rng(seed), []
    for length in lengths:
        tokens = rng.integers(4, 60, length).astype(DTYPE)
        tokens[0] = 1 | FIRST
        learned = rng.random(length) < 0.5
        learned[0], learned[-1] = False, length > 1
        parts.append(tokens | np.where(learned, LEARNED, 0).astype(DTYPE))
    return np.concatenate(parts)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 17), max_size=300), st.integers(17, 40))
def test_first_fit_overfills_no_window_and_leaves_none_half_empty(lengths, size):
    window_of = first_fit(lengths, size)
    filled = np.bincount(window_of, lengths, minlength=1) if lengths else np.zeros(1)
    assert filled.max() <= size
    assert sorted(set(window_of.tolist())) == list(range(len(set(window_of.tolist()))))
    if len(filled) <= OPEN_WINDOWS:  # of two windows that were open together the second had no room in the first
        assert (filled <= size / 2).sum() <= 1


def test_every_conversation_is_in_one_window_whole():
    tokens = stream(lengths := [5, 9, 2, 12, 16, 30, 3, 7, 7, 2])
    windows = PackedWindows(tokens, 16, PAD)
    found = []
    for number in range(len(windows)):
        window = windows[number]
        assert window.dtype == np.int32 and len(window) == 17
        starts = np.flatnonzero(window & FIRST)
        found += [part.tolist() for part in np.split(window, starts)[1:] if token_ids(part[0], MARKED) != PAD]
    starts = np.cumsum([0, *lengths[:-1]])
    wanted = [tokens[s : s + min(n, 17)].tolist() for s, n in zip(starts, lengths, strict=True)]
    assert sorted(found) == sorted(wanted)
    assert len(windows) < len(lengths)


def test_a_conversation_without_a_learned_token_in_the_window_is_left_out():
    tokens = stream([6, 6])
    tokens[:6] &= ~DTYPE.type(LEARNED)
    assert len(PackedWindows(tokens, 5, PAD)) == 1
    assert len(PackedWindows(tokens, 5, PAD, all_learned=True)) == 2


def test_windows_too_short_for_any_answer_are_refused(tmp_path):
    tokens = stream([40] * 9 + [50])
    tokens[np.arange(len(tokens)) % 40 < 39] &= ~DTYPE.type(LEARNED)
    config = build_config(**{"model.seq_len": 16})
    with pytest.raises(
        ValueError, match=r"model.seq_len=16 must hold a conversation .*; try --config.model.seq_len=64$"
    ):
        training_windows(tokens, config, 1, PAD, chat=True)
    assert len(training_windows(tokens, build_config(**{"model.seq_len": 64}), 1, PAD, chat=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [MARKED, ALL_LEARNED])
def test_packed_loss_and_gradient_are_those_of_each_conversation_alone(mode, cpu):
    config = build_config(**{"model.seq_len": 32, "model.mask_documents": True, "tokenizer.vocab_size": 512})
    model = make_model(config, cpu, jnp.float32)
    params = model.init(jax.random.PRNGKey(0), jnp.zeros((1, 8), jnp.int32))["params"]
    tokens = stream(lengths := [5, 9, 2, 12, 16, 30, 3, 7, 7, 2])

    def total(params, windows):
        return token_losses(model, params, windows, mode, is_learned(windows[:, 1:], mode).astype(jnp.float32))

    def alone(params, ids, learned):
        plain = model.clone(config=dataclasses.replace(model.config, mask_documents=False))
        return token_losses(plain, params, ids, -1, learned.astype(jnp.float32))

    packed = PackedWindows(tokens, 32, PAD, all_learned=mode == ALL_LEARNED)
    windows = jnp.array(np.stack([packed[i] for i in range(len(packed))]))
    ends = np.cumsum(lengths)
    rows = np.full((len(lengths), 33), PAD | FIRST, np.int32)  # each conversation alone in a row
    for row, end, length in zip(rows, ends, lengths, strict=True):
        row[:length] = tokens[end - length : end]
    learned = jnp.array(is_learned(rows[:, 1:], mode))
    assert learned.sum() == is_learned(windows[:, 1:], mode).sum()
    loss, gradient = jax.value_and_grad(total)(params, windows)
    wanted, wanted_gradient = jax.value_and_grad(alone)(params, jnp.array(rows & (FIRST - 1)), learned)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for one, other in zip(*map(jax.tree_util.tree_leaves, (gradient, wanted_gradient)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
