"""What the checks of a save cost is measured on the files and arrays of a real save."""

import json

import pytest
from helpers import build_config, run_script

from tale_jax.bench.saving import SavingCost
from tale_jax.bench.throughput import Bench, Timing
from tale_jax.training.checkpoint import arrays_of, num_bytes


def test_shares_are_of_the_median_save_of_orbax_and_of_an_interval():
    checks = {"digests": Timing((0.1, 0.2, 0.3)), "sums": Timing((0.3,))}
    saves = Timing((9.0, 5.5, 5.5)), Timing((5.0, 4.0, 6.0))
    cost = SavingCost(10, 40, *saves, checks, Timing((1.0,)), every_steps=45)
    assert cost.added_seconds == pytest.approx(0.5) and cost.share_of_save == pytest.approx(0.1)
    assert cost.share_of_run == pytest.approx(0.01)
    assert SavingCost(10, 40, *saves, checks, Timing((1.0,)), every_steps=0).share_of_run == 0


@pytest.mark.slow
def test_the_script_measures_a_save_of_the_whole_state(cpu):
    flags = ("--config=configs/tales.py:tiny", "--config.backend.platform=cpu", "--config.precision=float32")
    done = run_script("bench", *flags, "--config.tokenizer.vocab_size=320", "--saving", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    state = Bench(build_config(**{"tokenizer.vocab_size": 320, "precision": "float32"}), cpu).trainer.abstract_state
    assert record["state_bytes"] == num_bytes(arrays_of(state))
    assert min(record["save_seconds"], record["plain_save_seconds"]) > 0
    assert len(record["check_seconds"]) == 2 and all(seconds > 0 for seconds in record["check_seconds"].values())
