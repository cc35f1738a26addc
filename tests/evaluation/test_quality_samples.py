"""The samples that are measured: held-out openings, published prompts, every one kept."""

import json
import shutil

import numpy as np
import pytest
from helpers import run_script

from tale_jax.data.token_files import iter_documents, load_tokens
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.evaluation import quality_samples
from tale_jax.evaluation.quality_samples import held_out_texts, spread_tokens
from tale_jax.evaluation.text_quality import LIMITS


@pytest.fixture(scope="module")
def tokenizer(trained):
    return Tokenizer.load(trained / "tokenizer" / "tokenizer.model")


def test_held_out_texts_stand_in_the_split_in_whole_words(trained, tokenizer):
    tokens, _ = load_tokens(trained, "valid")
    documents = list(iter_documents(tokens, tokenizer))
    for opening, length in ((32, 160), (10, 20)):
        texts = held_out_texts(tokens, tokenizer, opening, length, 30)
        assert len(texts) == 30 == len(set(texts))
        for prompt, text in texts:
            document = next(d for d in documents if prompt + text in d)
            at = document.index(prompt + text)
            assert at == 0 or (text.startswith((" ", "\n")) and prompt.startswith((" ", "\n")))
            assert len(tokenizer.encode(prompt)) < opening + 8


def test_the_published_prompts_are_different_and_fit():
    assert len(set(quality_samples.PROMPTS)) == len(quality_samples.PROMPTS) == quality_samples.NUM_SAMPLES // 4
    assert all(prompt == prompt.strip() for prompt in quality_samples.PROMPTS)


@pytest.mark.slow
def test_the_script_adds_quality_and_keeps_every_sample(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    results = []
    for flags in ([], ["--quality"]):
        done = run_script("evaluate", f"--workdir={workdir}", "--json", "--num_samples=2", *flags)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    plain, result = results
    quality = result.pop("quality")
    assert result.keys() == plain.keys() and result["nats_per_token"] == plain["nats_per_token"]
    assert [one["temperature"] for one in quality] == list(quality_samples.TEMPERATURES)
    for one in quality:
        assert list(one["measures"]) == list(LIMITS)
        assert one["not_tested"] == "sense" and one["in_range"] == all(
            measure["in_range"] for measure in one["measures"].values()
        )
        for measure in one["measures"].values():
            assert {"samples", "held_out", "lower", "upper", "ratio", "in_range", "verdict", "control_ratio"} == set(
                measure
            )
    records = [json.loads(line) for line in (workdir / "quality.jsonl").read_text().splitlines()]
    assert len(records) == sum(one["num_samples"] for one in quality)
    assert {"prompt", "text", "seed", "number", "temperature", "step", "split"} <= set(records[0])
    assert {record["prompt"] for record in records} >= set(quality_samples.PROMPTS[:2])
    kept = json.loads((workdir / "evaluations.jsonl").read_text().splitlines()[-1])
    assert kept["quality"] == quality


def test_a_long_stream_is_read_in_parts_spread_evenly():
    stream = np.arange(1000)
    np.testing.assert_array_equal(spread_tokens(stream, 1000), stream)
    np.testing.assert_array_equal(
        spread_tokens(stream, 12, parts=4), [0, 1, 2, 250, 251, 252, 500, 501, 502, 750, 751, 752]
    )
