"""Rates: what they count, and that each kind is measured. No test asserts a time."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import build_config

from tale_jax.bench.throughput import (
    Bench,
    NumbersTokenizer,
    Rate,
    Timing,
    describe_record,
    measure,
    repeat,
    tables,
)
from tale_jax.hardware.peak import UNKNOWN_PEAK_NOTE
from tale_jax.model.transformer import flops_per_token

SMALL = {"model.seq_len": 64, "precision": "float32", "tokenizer.vocab_size": 512}


@pytest.fixture(scope="module")
def subject(cpu):
    return Bench(build_config(**SMALL), cpu)


def test_a_rate_is_tokens_over_the_median_and_its_share_is_of_model_flops():
    rate = Rate(tokens=100, timing=Timing((1.0, 4.0, 2.0, 2.0, 3.0)), flops=6.0, peak=3000.0)
    assert rate.tokens_per_second == 50 and rate.peak_share == pytest.approx(0.1)
    assert dataclasses.replace(rate, peak=0.0).record()["peak_share"] is None
    record = rate.record()
    assert (record["low"], record["high"], record["repetitions"]) == (pytest.approx(100 / 3), 50, 5)


def test_repeat_warms_up_and_does_as_many_as_it_must():
    calls = []
    assert len(repeat(lambda: calls.append(None), 0.0, min_repetitions=3, warmup=2).seconds) == 3
    assert len(calls) == 5


def test_every_kind_is_measured_and_counts_its_tokens(subject, monkeypatch):
    monkeypatch.setattr("tale_jax.bench.throughput.matmul_peak_of_all", lambda backend, name: 1e15)
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


def test_the_sampler_makes_as_many_tokens_as_are_counted(subject):
    tokens, _ = subject._decode(2, 0.0)
    sampler, results = subject.sampler, []
    sampler.decode, decode = lambda *args: results.append(decode(*args)) or results[-1], sampler.decode
    subject._decode(2, 0.0)
    sampler.decode = decode
    repetitions = 4  # one to warm up, three that count
    per_repetition = sum(result[1].size for result in results) / repetitions
    assert tokens <= per_repetition < tokens + 2 * 16  # the last chunk may reach beyond


@pytest.mark.parametrize("kind", ["trains", "decode_x", "decode_0", "score_2"])
def test_an_unknown_kind_is_refused(subject, kind):
    with pytest.raises(ValueError, match=rf"^--only={kind} must be train, score, decode or decode_N"):
        subject.rate(kind, 0.0)


def test_text_of_numbers_is_its_tokens():
    numbers = NumbersTokenizer(600)
    np.testing.assert_array_equal(numbers.encode("17 4 599"), [17, 4, 599])
    assert numbers.decode([17, 4]) == "17 4 "


def test_a_record_in_one_line():
    record = {"params": 1234, "flops_per_token": 5_600_000, "precision": "float32", "device": "M2"}
    line = describe_record(record | {"matmul_peak": {"bfloat16": 1e12, "float32": 5e11}})
    assert line == (
        "1,234 parameters, 5.6 MFLOP a token, float32; M2; matrix products, GFLOP/s: bfloat16 1,000, float32 500"
    )


def test_a_share_of_a_peak_that_is_not_known_is_left_out():
    rate = Rate(tokens=100, timing=Timing((1.0, 1.0)), flops=6.0, peak=0.0).record()
    record = {"params": 1234, "flops_per_token": 5_600_000, "precision": "float32", "device": "M2", "peak_bytes": 1e6}
    record |= {"matmul_peak": {}, "train": rate}
    assert describe_record(record).endswith(f"; M2; {UNKNOWN_PEAK_NOTE}")
    assert next(iter(tables({"": record})[0].columns[4].cells)) == "–"


def test_peaks_of_the_dtypes_that_may_run(cpu, monkeypatch):
    monkeypatch.setattr("tale_jax.bench.throughput.matmul_peak_of_all", lambda _, name: {"float32": 2.0}.get(name, 3.0))
    assert Bench(build_config(**SMALL), cpu).peaks == {"float32": 2.0, "bfloat16": 3.0}
    metal = Bench(build_config(**SMALL), cpu)
    metal.backend = dataclasses.replace(cpu, platform="metal")  # on which a dtype may not run at all
    assert metal.peaks == {"float32": 2.0}
