"""Batches: every window once a pass, in a new order each time, whatever the processes, and the same after a stop."""

import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tale_jax.data.loader import Batches, Windows, split_windows, window_starts

TOKENS = np.arange(1005, dtype=np.uint16)  # 100 windows of 10, and a rest that is in no window


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def make(**changes):
    settings = {"seq_len": 10, "batch_size": 5, "seed": 0} | changes
    return Batches(TOKENS, window_starts(TOKENS, settings["seq_len"]), **settings)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 8))
def test_windows_predict_every_token_but_the_first_once(num_tokens, seq_len):
    tokens = np.arange(num_tokens, dtype=np.uint16)
    windows = Windows(tokens, window_starts(tokens, seq_len), seq_len)
    targets = [int(token) for i in range(len(windows)) for token in windows[i][1:]]
    assert targets == list(range(1, len(windows) * seq_len + 1))
    assert num_tokens - len(targets) <= seq_len


@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(2, 16))
def test_windows_of_documents_start_at_each_document_and_cover_it(lengths, seq_len):
    """Each document starts a window; all its tokens are predicted, the first `seq_len` from all that is before them."""
    documents = np.cumsum([0, *lengths[:-1]])
    tokens = np.full(sum(lengths) + seq_len + 1, 7, np.uint16)  # the last window of the stream needs room
    tokens[documents] = 1
    tokens[sum(lengths)] = 1
    starts = window_starts(tokens, seq_len, bos_id=1).tolist()
    assert set(documents.tolist()) <= set(starts)
    for document, length in zip(documents.tolist(), lengths, strict=True):
        own = [start for start in starts if document <= start < document + length]
        assert own == list(range(document, document + max(1, length - 1), seq_len))


def test_each_pass_is_whole_and_in_a_new_order():
    batches = take(make(), 60)
    assert all(batch.shape == (5, 11) and batch.dtype == np.int32 for batch in batches)
    starts = np.concatenate([batch[:, 0] for batch in batches]).reshape(3, 100)
    assert all(sorted(order) == list(range(0, 1000, 10)) for order in starts.tolist())
    assert len({tuple(order) for order in starts.tolist()}) == 3
    assert not (starts[0] == np.sort(starts[0])).all()


def test_seeds_give_other_orders():
    orders = [np.concatenate(take(make(seed=seed), 40))[:, 0].reshape(2, 100).tolist() for seed in (0, 1)]
    assert len({tuple(order) for seed in orders for order in seed}) == 4


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_the_rows_of_the_same_batches(count):
    alone = take(make(batch_size=8), 30)
    shares = [take(make(batch_size=8, block=p, num_blocks=count), 30) for p in range(count)]
    for number, batch in enumerate(alone):
        assert (np.concatenate([share[number] for share in shares]) == batch).all()


@pytest.mark.parametrize(("num_threads", "prefetch"), [(0, 0), (1, 1), (2, 8)])
@pytest.mark.parametrize("stop", [0, 1, 19, 20, 45])
def test_goes_on_exactly_after_a_stop(stop, num_threads, prefetch):
    through = take(make(), 50)
    first = make(num_threads=num_threads, prefetch=prefetch)
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))
    second = make()
    next(second)
    second.set_state(state)
    assert second.passes == stop * 5 / 100
    assert (np.stack(take(second, 5)) == np.stack(through[stop : stop + 5])).all()


def test_state_is_the_same_on_every_process_and_serves_any_number_of_them():
    shares = [make(batch_size=8, block=p, num_blocks=2) for p in range(2)]
    for share in shares:
        take(share, 7)
    assert shares[0].get_state() == shares[1].get_state()
    alone = make(batch_size=8)
    alone.set_state(shares[1].get_state())
    assert (take(alone, 1)[0] == take(make(batch_size=8), 8)[7]).all()


def test_a_batch_of_another_size_goes_on_with_the_next_window():
    """Also where the examples given so far are no multiple of it, over any number of processes."""
    through = np.concatenate(take(make(), 60))
    for count in (1, 2, 4):
        shares = [make(batch_size=8, block=p, num_blocks=count) for p in range(count)]
        for share in shares:
            share.set_state(make().get_state() | {"examples": 35})
        batch = np.concatenate([take(share, 2)[1] for share in shares])
        assert (batch == through[43:51]).all()


def test_positions_in_other_windows_are_refused():
    state = make().get_state()
    for changes, field in (({"seed": 1}, "seed=1"), ({"seq_len": 9}, "num_windows=111")):
        with pytest.raises(ValueError, match=field):
            make(**changes).set_state(state)


def test_positions_in_other_text_are_known_as_such():
    old, state = make().get_state(), make(text="digest").get_state()
    assert state["text"] == "digest"
    same, other = make(text="digest"), make(text="another")
    assert same.is_in_this_text(state) and same.is_in_this_text(old) and make().is_in_this_text(state)
    assert not other.is_in_this_text(state) and not make(seq_len=9).is_in_this_text(old)
    same.set_state(state)
    same.set_state(old)  # of version 0.2
    with pytest.raises(ValueError, match="text=another must be digest"):
        other.set_state(state)


def test_too_few_windows():
    with pytest.raises(ValueError, match=r"batch_size=101 must not exceed the 100 windows of model\.seq_len=10"):
        make(batch_size=101)


@pytest.mark.parametrize("divisor", [1, 2, 5])
def test_split_windows_hold_the_same_inputs_and_targets(divisor):
    windows = next(make())
    short = split_windows(windows, divisor)
    assert short.shape == (5 * divisor, 10 // divisor + 1)
    np.testing.assert_array_equal(short[:, :-1].ravel(), windows[:, :-1].ravel())
    np.testing.assert_array_equal(short[:, 1:].ravel(), windows[:, 1:].ravel())


def test_closing_ends_the_threads_that_read_ahead():
    before = set(threading.enumerate())
    batches = make(num_threads=2)
    next(batches)
    batches.set_state(batches.get_state())  # a resumed run starts threads of its own
    next(batches)
    threads = set(threading.enumerate()) - before
    assert len(threads) >= 2
    batches.close()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    batches.close()  # again does no harm
    make(num_threads=2).close()  # nor before the first batch
