"""A run that was cut after any step ends with the bits of one that was not, for every option that changes its state.

Through the disk and in new objects: weights, moments, moving average, scale of the loss, losses that the guard
remembers, position in the text (a pass ends within the run) and every metric that follows.
"""

import jax
import numpy as np
import pytest
from helpers import SEQ_LEN, VOCAB_SIZE, assert_trees_equal, tiny_trainer

from tale_jax.data.loader import Batches, window_starts
from tale_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.faults

STEPS, BATCH_SIZE = 20, 8
WINDOWS = 5 * BATCH_SIZE + 3  # a pass ends inside the 6th batch, and so on
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, WINDOWS * SEQ_LEN + 1).astype(np.uint16)
OPTIONS = {
    "plain": {},
    "dropout": {"model.dropout": 0.1, "model.embedding_dropout": 0.1},
    "accumulation": {"micro_batch_size": 2, "model.dropout": 0.1},
    "ema": {"ema.decay": 0.9},
    "float16": {"dtype": np.float16, "optimizer.learning_rate": 1e-3},
    "bfloat16": {"dtype": jax.numpy.bfloat16},
    "muon": {"optimizer.name": "muon"},
    "adamw": {"optimizer.name": "adamw"},
    "guard off": {"on_spike": "off"},
    "2 devices": {"devices": 2, "model.dropout": 0.1},
    "4 devices": {"devices": 4, "data": 2, "fsdp": 2, "ema.decay": 0.9},
    "8 devices": {"devices": 8, "data": 4, "fsdp": 2},
}


def make_batches():
    return Batches(TOKENS, window_starts(TOKENS, SEQ_LEN), seq_len=SEQ_LEN, batch_size=BATCH_SIZE, seed=0)


def go(trainer, state, batches, steps, each=lambda step, state: None):
    """The state after so many steps, the batches and the metrics of each."""
    taken, rows = [], []
    for number in range(steps):
        taken.append(next(batches))
        state, metrics = trainer.step(state, trainer.place(taken[-1]))
        rows.append(jax.device_get(metrics))
        each(number + 1, state)
    return state, taken, rows


@pytest.mark.parametrize("name", OPTIONS)
def test_every_cut_goes_on_to_the_same_bits(tmp_path, tell, name):
    trainer, batches = tiny_trainer(**{"total_steps": STEPS} | OPTIONS[name]), make_batches()

    def save(step, state):
        checkpoints = Checkpoints(tmp_path / str(step), 1)
        checkpoints.save(step, state, batches.get_state(), None)
        checkpoints.close()

    whole, all_windows, all_rows = go(trainer, trainer.init(), batches, STEPS, save)
    equal = 0
    for cut in range(1, STEPS):
        checkpoints, again = Checkpoints(tmp_path / str(cut), 1), make_batches()
        state, position = checkpoints.restore(trainer.abstract_state, trainer.state_shardings)
        checkpoints.close()
        again.set_state(position)
        state, windows, rows = go(trainer, state, again, STEPS - cut)
        assert_trees_equal((windows, rows), (all_windows[cut:], all_rows[cut:]))
        assert_trees_equal(state, whole)
        equal += 1
    tell(f"resumes that are equal to the bit, {name}: {equal} of the cuts after 1 to {STEPS - 1} steps")


def test_another_number_of_devices_reads_the_same_windows_and_takes_nearly_the_same_steps(tmp_path):
    """Sums in another order are not the same bits; the text and its order are."""
    one = tiny_trainer(total_steps=STEPS)
    batches = make_batches()
    state, first, _ = go(one, one.init(), batches, 7)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(7, state, batches.get_state(), None)
    checkpoints.close()
    whole, rest, rows = go(one, state, batches, STEPS - 7)
    for devices, data, fsdp in ((2, 2, 1), (4, 2, 2), (8, 8, 1)):
        other, again = tiny_trainer(devices, data, fsdp, total_steps=STEPS), make_batches()
        found, position = Checkpoints(tmp_path, 1).restore(other.abstract_state, other.state_shardings)
        again.set_state(position)
        found, windows, other_rows = go(other, found, again, STEPS - 7)
        assert_trees_equal(windows, rest)
        np.testing.assert_allclose([r["loss"] for r in other_rows], [r["loss"] for r in rows], rtol=1e-5)
        for a, b in zip(*map(jax.tree_util.tree_leaves, (found.params, whole.params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert len(first) == 7
