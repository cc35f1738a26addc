"""A split is measured whole, the numbers agree with each other, and every evaluation is kept."""

import json
import math
import shutil

import pytest

from tale_jax.model.transformer import count_parameters
from tale_jax.runs.evaluate import describe, evaluate, keep
from tale_jax.runs.experiment import open_experiment

FIELDS = (
    "split tokens words bytes nats_per_token token_perplexity word_perplexity bits_per_byte context stride step params"
)


@pytest.fixture
def experiment(trained, tmp_path, cpu):
    shutil.copytree(trained, tmp_path / "run")
    return open_experiment(tmp_path / "run", cpu)


def test_result_is_complete_and_consistent(experiment):
    result = evaluate(experiment, "test", num_samples=4)
    assert set(FIELDS.split()) <= set(result)
    manifest = json.loads((experiment.workdir / "windows" / "test.json").read_text())
    assert (result["words"], result["bytes"]) == (manifest["words"], manifest["bytes"])
    assert result["tokens"] == manifest["tokens"] - manifest["documents"]
    total = result["nats_per_token"] * result["tokens"]
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / result["bytes"])
    assert result["word_perplexity"] == pytest.approx(math.exp(total / result["words"]))
    assert result["excess_nats_per_token"] == pytest.approx(
        result["nats_per_token"] - result["floor_nats_per_token"], rel=1e-6
    )
    for share in ("accepted_share", "consistent_share", "copied_share"):
        assert 0 <= result[share] <= 1
    assert keep(experiment.workdir, result)
    last = (experiment.workdir / "evaluations.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["nats_per_token"] == result["nats_per_token"]
    assert 0 < result["nats_per_token_stderr"] < 0.1 * result["nats_per_token"]
    assert result["windows"] >= result["documents"] == result["texts"] == manifest["documents"]
    assert result["params"] == count_parameters(experiment.params) and result["step"] == experiment.step


def test_a_result_that_cannot_be_kept_is_told_and_not_lost(tmp_path, capfd):
    (tmp_path / "evaluations.jsonl").mkdir()
    assert not keep(tmp_path, {"step": 1})
    told = capfd.readouterr().err
    assert (
        told.startswith("note: ") and "evaluations.jsonl does not keep the result: " in told and told.count("\n") == 1
    )


def test_no_tales_are_sampled_where_none_are_asked_for(experiment):
    result = evaluate(experiment, num_samples=0)
    assert "accepted_share" not in result and "excess_nats_per_token" in result


QUALITY_MEASURE = {
    "samples": 0.5,
    "held_out": 0.0,
    "lower": 0.0,
    "upper": 0.02,
    "ratio": None,
    "control_ratio": 1.25,
    "in_range": False,
    "verdict": "too high: repeats itself",
}
QUALITY = {"temperature": 0.8, "num_samples": 64, "words": 6345, "measures": {"repetition": QUALITY_MEASURE}}


def test_a_result_is_described_line_by_line():
    lines = describe({"split": "valid", "nats_per_token": 1.23456, "tokens": 99, "quality": [QUALITY]}).splitlines()
    assert lines[0].split() == ["split", "valid"] and lines[1].split() == ["nats_per_token", "1.2346"]
    assert lines[3] == "64 samples at temperature 0.8, 6,345 words"
    assert lines[4].split() == ["samples", "held-out", "ratio", "by", "chance", "range", "verdict"]
    values = ["0.500", "0.000", "–", "1.25", "0.000", "to", "0.020", "too", "high:", "repeats", "itself"]
    assert lines[5].endswith("too high: repeats itself") and lines[5].split()[-len(values) :] == values
    assert len({line.index(word) for line, word in zip(lines[4:6], ("verdict", "too high"), strict=True)}) == 1
    assert lines[6:] == ["Not tested: sense. Text without any can be in range by every measure."]


def test_what_version_0_2_called_as_held_out_text_is_in_range():
    old = {"measures": {"repetition": QUALITY_MEASURE | {"verdict": "as held-out text"}}}
    assert describe({"quality": [QUALITY | old]}).splitlines()[2].endswith("  in range")


def test_a_table_too_wide_for_the_terminal_is_told_in_two_lines_a_row():
    lines = describe({"quality": [QUALITY]}, 60).splitlines()
    assert lines[1:3] == [
        "  repetition: 4-grams that the text had before",
        "    0.500 (held-out 0.000, range 0.000 to 0.020): too high: repeats itself",
    ]
    assert describe({"quality": [QUALITY]}, 300) == describe({"quality": [QUALITY]})


def test_a_word_perplexity_that_says_nothing_is_told_as_such():
    known = {"word_perplexity": 123.4, "words": 75_000, "bytes": 390_000}
    assert describe(known).splitlines()[0].endswith("123.4000")
    assert "says nothing: a word of this text has 6,000 bytes" in describe(known | {"words": 65})
    assert "exp of 13.8 nats a word, of 200 words" in describe(
        known | {"word_perplexity": 1e6, "words": 200, "bytes": 1000}
    )
    assert "exp of 13.8 nats a word" in describe(known | {"word_perplexity": 1e6})
    assert describe(known | {"word_perplexity": None, "words": 0}).splitlines()[0].endswith("  –")


def test_a_loss_is_described_with_its_interval_and_what_it_tells_little_about():
    result = {"nats_per_token": 3.5, "nats_per_token_stderr": 0.1, "documents": 4, "texts": 1, "tokens": 99}
    lines = describe(result).splitlines()
    assert lines[0].split() == ["nats_per_token", "3.5000", "±", "0.1960"]
    assert lines[-1] == "the documents are passages of 1 text: the loss says little about any other"
    assert "little" not in describe(result | {"texts": 4}) and "little" not in describe(result | {"texts": 400})
    assert describe({"nats_per_token": 3.5, "nats_per_token_stderr": None}).endswith("3.5000 ± –")
