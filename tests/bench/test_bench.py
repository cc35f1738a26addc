"""The benchmarks: what they count, how they compare, and that each of them runs. No test asserts a time."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from helpers import build_config, run_script

from tale_jax.bench.compare import Comparison, Round, compare, json_lines, variants
from tale_jax.bench.profile import PARTS, instructions, part_of, profile
from tale_jax.bench.run import BenchRequest, bench
from tale_jax.bench.throughput import Bench, Numbers, Rate, Timing, measure, repeat, tables
from tale_jax.model.transformer import flops_per_token
from tale_jax.runs.plots import plot_rates

SMALL = {"model.seq_len": 64, "precision": "float32", "tokenizer.vocab_size": 512}
PEER = 'import json; print("starts"); print(json.dumps({"kind": "%s", "mode": "%s", "tokens_per_s": %s}))'


@pytest.fixture(scope="module")
def subject(cpu):
    return Bench(build_config(**SMALL), cpu)


def test_a_rate_is_tokens_over_the_median_and_its_share_is_of_model_flops():
    rate = Rate(tokens=100, timing=Timing((1.0, 4.0, 2.0, 2.0, 3.0)), flops=6.0, peak=3000.0)
    assert rate.tokens_per_second == 50 and rate.peak_share == pytest.approx(0.1)
    record = rate.record()
    assert (record["low"], record["high"], record["repetitions"]) == (pytest.approx(100 / 3), 50, 5)


def test_repeat_warms_up_and_does_the_least_it_was_told():
    calls = []
    assert len(repeat(lambda: calls.append(None), 0.0, least=3, warmup=2).seconds) == 3
    assert len(calls) == 5


def test_every_kind_is_measured_and_counts_its_tokens(subject):
    report = measure(subject, ["train", "score", "decode", "decode_3"], seconds=0.0)
    config, flops = subject.config, flops_per_token(subject.config.model, 512)
    assert report.rates["train"].tokens == report.rates["score"].tokens == config.batch_size * 64
    assert 3 * report.rates["decode"].tokens == report.rates["decode_3"].tokens
    assert report.rates["train"].flops == flops and report.rates["decode"].flops == flops / 3
    record = json.loads(json.dumps(report.record()))
    for kind in ("train", "score", "decode", "decode_3"):
        assert record[kind]["low"] <= record[kind]["tokens_per_second"] <= record[kind]["high"]
        share = record[kind]["tokens_per_second"] * report.rates[kind].flops / record["matmul_peak"]["float32"]
        assert record[kind]["peak_share"] == pytest.approx(share)
    assert record["peak_bytes"] > 1e7
    assert tables({"": record})[0].row_count == 4


def test_the_sampler_draws_as_many_tokens_as_are_counted(subject):
    tokens, _ = subject._decode(2, 0.0)
    sampler, drawn = subject.sampler, []
    sampler.decode, decode = lambda *a: drawn.append(decode(*a)) or drawn[-1], sampler.decode
    subject._decode(2, 0.0)
    sampler.decode = decode
    runs = 4  # one to warm up, three that count
    per_run = sum(result[1].size for result in drawn) / runs
    assert tokens <= per_run < tokens + 2 * 16  # the last chunk may reach beyond


@pytest.mark.parametrize("kind", ["trains", "decode_x", "decode_0", "score_2"])
def test_an_unknown_kind_is_refused(subject, kind):
    with pytest.raises(ValueError, match=rf"^kind={kind} must be train, score, decode or decode_N"):
        subject.rate(kind, 0.0)


def test_numbers_are_spelled_as_they_are():
    numbers = Numbers(600)
    np.testing.assert_array_equal(numbers.encode("17 4 599"), [17, 4, 599])
    assert numbers.decode([17, 4]) == "17 4 "


# Others.


def test_a_sweep_is_every_combination():
    found = list(variants(["config.model.embed_dim=64,128", "batch_size=4,8"]))
    assert found[0] == {"model.embed_dim": "64", "batch_size": "4"} and len(found) == 4
    assert list(variants([])) == [{}]
    for wrong in ("model.embed_dim", "=1", "batch_size=1,,2"):
        with pytest.raises(ValueError, match="must be NAME=VALUE,VALUE"):
            list(variants([wrong]))


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
    with pytest.raises(ValueError, match=r"exit code 3: no JSON object"):
        json_lines([sys.executable, "-c", "import sys; sys.exit(3)"])
    script = tmp_path / "peer.py"
    script.write_text(PEER % ("decode", "x", 1))
    with pytest.raises(ValueError, match="must print a kind of score"):
        compare(subject, f"{sys.executable} {script}", 1, 0.0, ["score"])


def test_the_ratio_is_to_the_best_mode():
    rounds = (Round("train", 10.0, {"a": 4.0, "b": 5.0}),)
    assert Comparison("x", rounds).record()["train"] == {"median_ratio": 2.0, "ratios": [2.0]}


# The profile.


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(train_step)/jvp(Transformer)/blocks/mlp/gate/dot_general", "blocks: products"),
        ("jit(train_step)/transpose(jvp(Transformer))/blocks/attention/query/dot_general", "blocks: products"),
        ("jit(train_step)/jvp(Transformer)/blocks/attention/dot_general", "blocks: attention core"),
        ("jit(train_step)/jvp(Transformer)/blocks/attention/query_norm/mul", "blocks: norms"),
        ("jit(train_step)/jvp(Transformer)/blocks/mlp/jit(silu)/mul", "blocks: rest"),
        ("jit(train_step)/jvp(Transformer)/dot_general", "head and loss"),
        ("jit(train_step)/jvp()/log", "head and loss"),
        ("jit(train_step)/jvp(Transformer)/jit(_take)/gather", "embedding"),
        ("jit(train_step)/mul", "optimizer"),
    ],
)
def test_an_instruction_belongs_to_the_part_its_name_says(op_name, part):
    assert part_of(op_name) == part


def test_containers_are_not_counted_beside_what_they_hold():
    found = instructions(
        """
  %dot.1 = f32[8,8]{1,0} dot(%a, %b), metadata={op_name="jit(f)/dot_general" source_line=3}
  ROOT %while.2 = (s32[], f32[8]{0}) while(%tuple.1), condition=%c, body=%d
  add.3 = f32[] add(%x, %y)
"""
    )
    assert found == {"dot.1": "jit(f)/dot_general", "add.3": ""}


def test_a_profile_finds_the_parts_of_a_step(subject):
    found = profile(subject)
    shares = {part: row["share"] for part, row in found.record()["profile"].items()}
    assert sum(shares.values()) == pytest.approx(1)
    assert {"blocks: products", "blocks: attention core", "head and loss", "optimizer"} <= set(shares)
    assert set(shares) <= {part for part, _ in PARTS}
    assert [table.row_count for table in found.tables()] == [len(shares), len(found.longest)]


# What a user sees.


def test_rates_are_drawn(tmp_path):
    rate = {"tokens_per_second": 10.0, "low": 8.0, "high": 11.0, "peak_share": 0.5}
    records = {"a": {"train": rate, "score": rate, "params": 3}, "b": {"train": rate, "score": rate}}
    plot_rates(records, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--peer and --profile are measured apart"):
        BenchRequest(("train",), 1.0, peer="x", profile=True)
    with pytest.raises(ValueError, match="--plot="):
        bench(build_config(), BenchRequest(("train",), 1.0, profile=True), tmp_path / "x.png")


def test_bench_runs_as_a_user_runs_it(tmp_path):
    flags = ["--config=configs/tales.py:tiny", "--seconds=0", "--config.model.seq_len=32", "--config.precision=float32"]
    done = run_script("bench", *flags, "--only=train,decode", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["train"]["tokens_per_second"] > 0 and 0 < record["decode"]["peak_share"] < 1
    done = run_script("bench", *flags, "--only=score", "--sweep=batch_size=2,4", f"--plot={tmp_path}/b.png")
    assert done.returncode == 0, done.stderr
    assert "batch_size=4" in done.stdout and (tmp_path / "b.png").exists()
    done = run_script("bench", *flags, "--only=nothing")
    assert done.returncode == 2 and done.stderr.startswith("error: kind=nothing must be")


@pytest.mark.slow
def test_the_first_step_and_the_first_text_are_timed():
    counts = {"train": 60, "valid": 8, "test": 8}
    small = [f"--config.corpus.num_{split}_tales={count}" for split, count in counts.items()]
    done = run_script("bench", "--config=configs/tales.py:tiny", *small, "--startup", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])["startup"]
    assert min(record[name][cache] for name in ("train", "sample") for cache in ("cold", "warm")) > 0
