"""Sweeps and peers: what is run, in which order, and what is compared."""

import dataclasses
import sys

import pytest
from helpers import build_config

from tale_jax.bench import compare as compare_module
from tale_jax.bench.compare import Comparison, Round, compare, run_json_lines, sweep, sweep_variants
from tale_jax.bench.throughput import Bench, Timing

SMALL = {"model.seq_len": 64, "precision": "float32", "tokenizer.vocab_size": 512}
PEER = 'import json; print("starts"); print(json.dumps({"kind": "%s", "mode": "%s", "tokens_per_s": %s}))'


@pytest.fixture(scope="module")
def subject(cpu):
    return Bench(build_config(**SMALL), cpu)


def test_a_sweep_is_every_combination():
    found = list(sweep_variants(["config.model.embed_dim=64,128", "batch_size=4,8"]))
    assert found[0] == {"model.embed_dim": "64", "batch_size": "4"} and len(found) == 4
    assert list(sweep_variants([])) == [{}]
    for wrong in ("model.embed_dim", "=1", "batch_size=1,,2"):
        with pytest.raises(ValueError, match="must be NAME=VALUE,VALUE"):
            list(sweep_variants([wrong]))


def test_each_variant_runs_in_a_process_of_its_own_with_the_same_flags(monkeypatch):
    commands, told = [], []

    def run(command):
        commands.append(command)
        return [{"ignored": 1}, {"rate": len(commands)}]

    monkeypatch.setattr(compare_module, "run_json_lines", run)
    records = sweep(["--config=x.py", "--seconds=1"], ["batch_size=4,8"], told.append)
    assert records == {"batch_size=4": {"rate": 1}, "batch_size=8": {"rate": 2}}
    assert told == list(records)
    for command, size in zip(commands, (4, 8), strict=True):
        assert command[1].endswith("launch/bench.py")
        assert command[2:] == ["--config=x.py", "--seconds=1", f"--config.batch_size={size}", "--json"]


def test_a_peer_takes_turns_and_its_best_mode_counts(subject, tmp_path):
    log = tmp_path / "turns"
    rates, subject_rate = iter([100.0, 300.0]), subject.rate

    def ours(kind, seconds):
        log.write_text(log.read_text() + "o")
        return dataclasses.replace(subject_rate("train", 0.0), tokens=1, timing=Timing((1 / next(rates),) * 2))

    script = tmp_path / "peer.py"
    lines = [PEER % ("train", "slow", 20), PEER % ("train", "best", 50), PEER % ("other", "x", 1)]
    turn = f"from pathlib import Path; log = Path({str(log)!r}); log.write_text(log.read_text() + 'p')"
    script.write_text("\n".join([*lines, turn]))
    log.touch()
    subject.rate = ours
    try:
        found = compare(subject, f"{sys.executable} {script}", 2, 0.0, ["train"])
    finally:
        del subject.rate
    assert log.read_text() == "opop"
    assert found.ratios() == {"train": [pytest.approx(2), pytest.approx(6)]}
    record = found.record()
    assert record["train"]["median_ratio"] == pytest.approx(4) and record["rounds"][0]["theirs"]["slow"] == 20
    assert found.tables()[0].row_count == 3


def test_a_peer_that_fails_or_measures_something_else_is_told(subject, tmp_path):
    with pytest.raises(ValueError, match=r"ended with exit code 3: nothing on stderr"):
        run_json_lines([sys.executable, "-c", "import sys; print('{}'); sys.exit(3)"])
    with pytest.raises(ValueError, match=r"ended with no JSON object on stdout"):
        run_json_lines([sys.executable, "-c", "print('3')"])
    script = tmp_path / "peer.py"
    script.write_text(PEER % ("decode", "x", 1))
    with pytest.raises(ValueError, match="must print a kind of score"):
        compare(subject, f"{sys.executable} {script}", 1, 0.0, ["score"])


def test_the_ratio_is_to_the_best_mode():
    rounds = (Round("train", 10.0, {"a": 4.0, "b": 5.0}),)
    assert Comparison("x", rounds).record()["train"] == {"median_ratio": 2.0, "ratios": [2.0]}
