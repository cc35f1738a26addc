"""Runs with different tokenizers are compared by bits per byte, and that is said."""

import math

import pytest

from tale_jax.runs.comparison import comparison_notes, loss_unit, tokenizers_differ
from tale_jax.runs.plots import plots
from tale_jax.runs.records import RunRecords


def run(name, tokenizer="x", bits=0.5, bytes_=1000, manifests=True, config=None):
    train = [{"step": step, "loss": 4.0 - step, "grad_norm": 1.0, "learning_rate": 1e-3} for step in (1, 2)]
    valid = [{"step": 2, "nats_per_token": 2.0, "bits_per_byte": bits, "excess_nats_per_token": 0.5}]
    manifest = {"tokenizer": tokenizer, "tokens": 310, "documents": 10, "bytes": bytes_, "words": 200}
    start = {"step": 0, "floor_nats_per_token": 1.5}
    records = {"run": [start], "train": train, "valid": valid}
    return RunRecords(name, config or {}, records, [], [], {"valid": manifest} if manifests else {})


def test_runs_of_one_tokenizer_keep_nats_per_token():
    runs = [run("a"), run("b", bits=0.7)]
    assert loss_unit(runs).name == "nats per token" and loss_unit(runs).factors == (1, 1)
    assert comparison_notes(runs) == []
    assert "nats per token" in plots(runs) and "bits per byte" not in plots(runs)


def test_runs_of_different_tokenizers_are_drawn_in_bits_per_byte():
    runs = [run("a"), run("b", tokenizer="y", bits=0.8)]
    unit = loss_unit(runs)
    assert unit.name == "bits per byte" and unit.factors == (0.25, 0.4)
    page = plots(runs)
    assert page.count(">bits per byte</text>") == 2 and "nats per token" not in page  # loss, and excess
    assert "entropy floor 0.375" in page and "entropy floor 0.600" in page
    [note] = comparison_notes(runs)
    assert "nats per token of different tokens cannot be compared" in note


def test_where_no_bits_per_byte_were_recorded_the_prepared_text_tells():
    runs = [run("a"), run("b", tokenizer="y", bits=None)]
    assert loss_unit(runs).factors[1] == pytest.approx(300 / 1000 / math.log(2))
    unknown = [run("a"), run("b", tokenizer="y", bits=None, bytes_=0)]
    assert math.isnan(loss_unit(unknown).factors[1])
    assert comparison_notes(unknown)[-1] == "Not drawn: the losses of b, of which no bits per byte are known."
    assert ">bits per byte</text>" in plots(unknown)


def test_without_a_manifest_settings_tell():
    settings = [{"tokenizer": {"vocab_size": size}} for size in (512, 512, 1024)]
    a, b, c = (run(str(i), manifests=False, config=config) for i, config in enumerate(settings))
    assert not tokenizers_differ([a, b]) and tokenizers_differ([a, b, c])
    assert not tokenizers_differ([a, run("unknown", manifests=False)])


def test_another_validation_text_is_said():
    [note] = comparison_notes([run("a"), run("b", bytes_=2000)])
    assert note.startswith("The validation texts of these runs differ")
