"""What `launch/bench.py` was asked for is run, shown and drawn."""

import json

import pytest
from helpers import build_config, run_script

from tale_jax.bench.run import BenchRequest, bench
from tale_jax.runs.plots import plot_rates


def test_rates_are_drawn(tmp_path):
    rate = {"tokens_per_second": 10.0, "low": 8.0, "high": 11.0, "peak_share": 0.5}
    records = {"a": {"train": rate, "score": rate, "params": 3}, "b": {"train": rate, "score": rate}}
    plot_rates(records, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--peer and --profile cannot be measured together; give one of them"):
        BenchRequest(("train",), 1.0, peer="x", profile=True)
    with pytest.raises(ValueError, match="--plot="):
        bench(build_config(), BenchRequest(("train",), 1.0, profile=True), tmp_path / "x.png")
    with pytest.raises(ValueError, match="must be NAME=VALUE,VALUE"):
        BenchRequest(("train",), 1.0, sweeps=("batch_size",))


@pytest.mark.parametrize("quiet", [False, True])
def test_rates_are_shown_unless_quiet(tmp_path, capsys, quiet):
    changes = {"model.seq_len": 32, "batch_size": 8, "micro_batch_size": 8}  # the tests simulate eight devices
    config = build_config(precision="float32", **changes | {"backend.platform": "cpu"})
    record = bench(config, BenchRequest(("score",), 0.0), tmp_path / "rates.png", quiet=quiet)
    assert record["score"]["tokens_per_second"] > 0
    assert (tmp_path / "rates.png").stat().st_size
    out = capsys.readouterr().out
    assert out == "" if quiet else ("parameters" in out and "score" in out and "rates.png" in out)


FLAGS = ["--config=configs/tales.py:tiny", "--seconds=0", "--config.model.seq_len=32", "--config.precision=float32"]


def test_bench_runs_as_a_user_runs_it():
    done = run_script("bench", *FLAGS, "--only=train,decode", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["train"]["tokens_per_second"] > 0 and 0 < (record["decode"]["peak_share"] or 0.5) < 1
    done = run_script("bench", *FLAGS, "--only=nothing")
    assert done.returncode == 2 and done.stderr.startswith("error: --only=nothing must be")


@pytest.mark.slow
def test_a_sweep_runs_as_a_user_runs_it(tmp_path):
    done = run_script("bench", *FLAGS, "--only=score", "--sweep=batch_size=2,4", f"--plot={tmp_path}/b.png")
    assert done.returncode == 0, done.stderr
    assert "batch_size=4" in done.stdout and (tmp_path / "b.png").exists()


@pytest.mark.slow
def test_the_first_step_and_the_first_text_are_timed():
    counts = {"train": 60, "valid": 8, "test": 8}
    small = [f"--config.corpus.num_{split}_tales={count}" for split, count in counts.items()]
    done = run_script("bench", "--config=configs/tales.py:tiny", *small, "--startup", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])["startup"]
    assert min(record[name][cache] for name in ("train", "sample") for cache in ("cold", "warm")) > 0
