"""Whatever the text is, everything that is written as JSON is JSON: null where a measure has no value, never NaN."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY_FILES, build_config, run_script

from tale_jax.evaluation.scoring import Evaluation, Scorer
from tale_jax.runs.evaluate import describe, evaluate
from tale_jax.runs.experiment import open_experiment
from tale_jax.runs.report import write_report
from tale_jax.runs.train import train
from tale_jax.utils.files import json_line, to_json

TINY = TINY_FILES | {"model.embed_dim": 32, "total_steps": 2, "sample.max_tokens": 4}


def dna() -> str:
    return "".join(random.Random(0).choices("ACGT", k=30_000))


def same() -> str:
    return "a" * 20_000


def nearly_blank() -> str:
    return "".join(f"{letter}{' ' * 400}\n\t" for letter in "xyz" * 20)


def random_bytes() -> str:
    """Each character once: nothing but bytes and characters can be learned."""
    return "".join(map(chr, range(0x4E00, 0x4E00 + 6000)))


TEXTS = {"dna": dna, "same": same, "nearly blank": nearly_blank, "every character once": random_bytes}


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def vocabulary(line: str) -> int:
    return int(line.partition("try --config.tokenizer.vocab_size=")[2].partition(",")[0])


def check_files(workdir: Path) -> None:
    """Every line of every file of JSON in a workdir."""
    files = [path for path in workdir.rglob("*.json*") if path.suffix in (".json", ".jsonl")]
    assert {"config.json", "metrics.jsonl", "samples.jsonl"} <= {path.name for path in files}
    for path in files:
        text = path.read_text()
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            strict(part)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_a_run_on_odd_text_writes_json(name, tmp_path, cpu):
    path, workdir = tmp_path / "texts" / "a.jsonl", tmp_path / "run"
    path.parent.mkdir()
    text = TEXTS[name]()
    rows = [text[start : start + 997] for start in range(0, len(text), 997)] if name != "same" else [text, "b" * 999]
    rows += [f"row {n}" for n in range(3)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    settings: dict[str, Any] = TINY | {"corpus.path": str(path), "tokenizer.vocab_size": 300}
    for _ in range(3):
        try:
            assert train(build_config(**settings), workdir, cpu).step == 2
            break
        except ValueError as error:
            settings["tokenizer.vocab_size"] = vocabulary(str(error))
            assert not workdir.exists()  # a refused run leaves nothing
    experiment = open_experiment(workdir, cpu)
    for split in ("train", "valid", "test"):
        result = strict(json_line(evaluate(experiment, split=split)))
        assert result["nats_per_token"] > 0 and "None" not in describe(result)
    check_files(workdir)
    assert write_report([workdir]).stat().st_size


@pytest.mark.slow
def test_scripts_print_json(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    config = ["--config=configs/tales.py:tiny", "--config.precision=float32", "--json"]
    for name, flags in {
        "evaluate": [f"--workdir={workdir}", "--json", "--num_samples=1", "--sample_temperature=0"],
        "sample": [f"--workdir={workdir}", "--json", "--max_tokens=1", "--temperature=0", "--repetition_penalty=9"],
        "plan": [*config, "--notime"],
        "bench": [*config, "--only=decode", "--seconds=0", "--config.model.seq_len=32"],
    }.items():
        done = run_script(name, *flags)
        assert done.returncode == 0, done.stderr
        assert strict(done.stdout.splitlines()[-1])
    check_files(workdir)


def test_a_split_of_which_no_token_counts_has_no_measures(trained, tmp_path, cpu):
    """As where the only window that is scored predicts nothing but BOS: null, and no error."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    opened = open_experiment(workdir, cpu)
    scorer = Scorer(opened.model, opened.tokenizer, 4)
    evaluation = Evaluation(workdir, "valid", scorer, opened.tokenizer, "stream", max_windows=1)
    (start,) = np.flatnonzero(evaluation.tokens[1:] == opened.tokenizer.bos_id)[:1].tolist()
    evaluation.spans = [evaluation.spans[0]._replace(start=start, first=start + 1, last=start + 2)]
    result = strict(json_line(evaluation(opened.params)))
    assert result["tokens"] == 0
    names = ("nats_per_token", "token_perplexity", "word_perplexity", "bits_per_byte")
    assert [result[name] for name in names] == [None] * 4


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (
            {"a": float("nan"), "b": {"c": [1.0, float("inf"), (float("-inf"),)]}},
            {"a": None, "b": {"c": [1.0, None, [None]]}},
        ),
        ([np.float32("nan"), np.int64(3), np.float64(0.5), True, None, "NaN"], [None, 3, 0.5, True, None, "NaN"]),
    ],
)
def test_what_has_no_value_is_null_however_deep(value, wanted):
    assert strict(json_line(value)) == to_json(value) == wanted
