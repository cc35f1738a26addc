"""What may happen to a workdir between two commands: another writer, more text, text without words."""

import json
import random
import shutil

import pytest
from helpers import TINY_FILES, build_config, run_script

from tale_jax.config import Config, change
from tale_jax.runs.train import train
from tale_jax.utils.locks import writer_lock
from tale_jax.utils.manifests import read_manifest, write_manifest

TINY = TINY_FILES | {
    "total_steps": 4,
    "tokenizer.vocab_size": 400,
    "evaluate.every_steps": 2,
    "checkpoint.every_steps": 2,
    "sample.max_tokens": 8,
}


def words(count, seed):
    rng = random.Random(seed)
    return "\n\n".join(
        " ".join(rng.choices(["moon", "river", "tale", "cat", "hen", "sea"], k=12)) for _ in range(count)
    )


def test_a_second_writer_of_any_kind_is_refused_in_one_line(tmp_path, monkeypatch):
    with writer_lock(tmp_path, "train"):
        flags = ("--config=configs/tales.py:tiny", f"--workdir={tmp_path}", "--config.backend.platform=cpu")
        for script in ("train", "prepare"):
            done = run_script(script, *flags)
            assert done.returncode == 2, done.stderr
            assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
            assert "is in use by train (process" in done.stderr and "kill" in done.stderr


@pytest.mark.slow
def test_more_text_is_refused_or_goes_on_with_the_weights(tmp_path, cpu, capsys):
    texts, workdir = tmp_path / "texts", tmp_path / "run"
    texts.mkdir()
    (texts / "one.txt").write_text(words(300, 0))
    settings = TINY | {"corpus.path": str(texts), "tokenizer.vocab_size": 300}
    train(build_config(**settings), workdir, cpu)
    (texts / "two.txt").write_text(words(300, 1))
    longer = settings | {"total_steps": 6}
    with pytest.raises(ValueError, match=r"corpus\.changed=continue"):
        train(build_config(**longer), workdir, cpu)
    assert train(build_config(**longer, **{"corpus.changed": "continue"}), workdir, cpu).step == 6
    assert "the text has changed: training goes on with the weights" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps.count(4) >= 1 and max(steps) == 6


@pytest.mark.slow
def test_text_without_words_has_no_word_perplexity_and_training_goes_on(tmp_path, cpu):
    """One word of a hundred thousand letters: four windows of it hold no whole word."""
    rng = random.Random(0)
    (tmp_path / "dna.txt").write_text("".join(rng.choices("ACGT", k=100_000)))
    config = build_config(**(TINY | {"corpus.path": str(tmp_path / "dna.txt")}))
    assert train(config, tmp_path / "run", cpu).step == 4
    done = run_script("evaluate", f"--workdir={tmp_path / 'run'}", "--json")
    result = json.loads(done.stdout.splitlines()[-1], parse_constant=lambda name: pytest.fail(name))
    assert result["bits_per_byte"] > 0 and (result["word_perplexity"] is None or result["word_perplexity"] > 0)


@pytest.mark.slow
def test_auto_precision_is_decided_once_a_run(trained, tmp_path, cpu):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    folder, config = workdir / "checkpoints" / "20", change(Config.load(workdir), {"total_steps": 22})
    facts = {name: value for name, value in read_manifest(folder).items() if name != "files"}
    before = facts["precision"]
    other = "bfloat16" if before == "float32" else "float32"
    write_manifest(folder, facts | {"precision": other})  # as on another machine
    assert train(change(config, {"precision": "auto"}), workdir, cpu).step == 22
    assert read_manifest(workdir / "checkpoints" / "22")["precision"] == other
    longer = change(config, {"total_steps": 24, "precision": other})
    with pytest.raises(ValueError, match=r'precision="\w+" must be "auto" to go on'):
        train(longer, workdir, cpu)
