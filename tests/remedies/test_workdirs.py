"""What is said of a damaged or foreign workdir is done, and it is read again."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, build_config
from remedies.test_data import refusal
from remedies.test_runs import signed

from tale_jax.config import Config, change
from tale_jax.data.prepare import prepare
from tale_jax.data.token_files import iter_documents, load_manifest, load_tokens
from tale_jax.data.tokenizer import Tokenizer, tokenizer_file
from tale_jax.runs.evaluate import evaluate
from tale_jax.runs.experiment import open_experiment
from tale_jax.runs.report import write_report
from tale_jax.runs.train import train
from tale_jax.runs.verify import repair, verify
from tale_jax.training.checkpoint import SavedParams, check_checkpoint
from tale_jax.utils.files import check_entries, check_inside
from tale_jax.utils.manifests import MANIFEST, hash_file, read_manifest, write_manifest


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a trained workdir, of a name with a space."""
    shutil.copytree(trained, tmp_path / "a run")
    return tmp_path / "a run"


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def command_in(line: str) -> list[str]:
    """The command between backquotes, run by this Python."""
    told = re.search(r"`python (launch/\S+ [^`]*)`", line)
    assert told, line
    return [sys.executable, *shlex.split(told[1])]


# config.json.


@pytest.mark.parametrize("content", ["{", "[]", "changed", None])
def test_a_config_comes_back_by_the_command_that_is_told(run, cpu, content):
    file, before = run / "config.json", Config.load(run)
    if content is None:
        file.unlink()
    elif content == "changed":
        file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    else:
        file.write_text(content)
    line = refusal(open_experiment, run, cpu)
    if content != "changed":
        assert train(build_config(), run, cpu).step == 20 if content is None else refusal(train, before, run, cpu)
    done = subprocess.run(command_in(line), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert Config.load(run) == before and open_experiment(run, cpu).step == 20


def test_without_its_config_a_run_goes_on_with_no_other_settings(run, cpu):
    (run / "config.json").unlink()
    line = refusal(train, change(build_config(), {"model.rope_base": 500.0}), run, cpu)
    told = re.search(r"(model\.rope_base)=500\.0 must be (\S+), as in checkpoint 20", line)
    assert told and train(change(build_config(), {told[1]: float(told[2])}), run, cpu).step == 20


# Tokenizer and windows.


def test_a_tokenizer_or_settings_of_another_run_are_restored_from_a_copy(run, trained, cpu):
    change(Config.load(run), {"model.rope_base": 500.0}).save(run)
    assert "restore config.json from a copy" in refusal(open_experiment, run, cpu)
    shutil.copy(trained / "config.json", run)
    assert open_experiment(run, cpu).step == 20
    other = Tokenizer.load(tokenizer_file(run)).model.replace(b"e", b"q", 40)
    tokenizer_file(run).write_bytes(other)
    assert refusal(open_experiment, run, cpu).endswith("restore that from a copy")
    shutil.copytree(trained / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
    assert open_experiment(run, cpu).step == 20


def test_damaged_windows_are_removed_as_told_and_made_again(run, trained, cpu):
    flip(run / "windows" / "valid.bin")
    for line in (refusal(load_tokens, run, "valid"), None):
        if line is None:
            (run / "windows" / "valid.bin").write_bytes(b"\0")
            line = refusal(load_tokens, run, "valid")
        told = re.search(r"remove (\S.*)/valid\.json and prepare again$", line)
        assert told
        (Path(told[1]) / "valid.json").unlink()
        prepare(build_config(), run)
        assert (run / "windows" / "valid.bin").read_bytes() == (trained / "windows" / "valid.bin").read_bytes()
    (run / "windows" / "train.json").write_text("{}")
    told = re.search(r"remove (\S.*) and prepare again$", refusal(load_manifest, run, "train"))
    assert told
    shutil.rmtree(told[1])
    prepare(build_config(), run)
    assert evaluate(open_experiment(run, cpu), num_samples=0)["tokens"]


def test_windows_of_other_text_are_restored_or_trained_on_anew(run, trained, cpu, tmp_path):
    shutil.rmtree(run / "windows")
    kept = tokenizer_file(run).read_bytes()
    shutil.rmtree(run / "tokenizer")
    other = change(build_config(), {"corpus.num_valid_tales": 9})
    prepare(other, run)
    tokenizer_file(run).write_bytes(kept)
    line = refusal(evaluate, open_experiment(run, cpu), num_samples=0)
    assert line.endswith("restore windows from a copy, or train in a new workdir")
    shutil.copytree(trained / "windows", run / "windows", dirs_exist_ok=True)
    assert evaluate(open_experiment(run, cpu), num_samples=0)["tokens"]


def test_windows_with_tokens_that_are_none_are_prepared_again(run):
    tokens, _ = load_tokens(run, "valid")
    tokenizer = Tokenizer.load(tokenizer_file(run))
    bad = np.array(tokens)
    bad[3] = tokenizer.vocab_size
    assert refusal(list, iter_documents(bad, tokenizer)).endswith("prepare again")
    shutil.rmtree(run / "windows")
    prepare(build_config(), run)
    assert list(iter_documents(load_tokens(run, "valid")[0], tokenizer))


# Checkpoints.


def test_a_damaged_checkpoint_is_passed_over_or_restored(run, trained, cpu, capsys):
    params = run / "checkpoints" / "20" / "params"
    flip(next(params.rglob("d/*")))
    line = refusal(open_experiment, run, cpu, step=20)
    told = re.search(r"checkpoint 20 of .* is damaged: params/.*; try --step=(\d+)$", line)
    assert told and open_experiment(run, cpu, step=int(told[1])).step == open_experiment(run, cpu).step == 10
    assert "checkpoint 20 is not used" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints" / "10")
    assert refusal(open_experiment, run, cpu, step=20).endswith("restore it from a copy")
    assert refusal(open_experiment, run, cpu).endswith("restore one from a copy")
    shutil.copytree(trained / "checkpoints" / "20", run / "checkpoints" / "20", dirs_exist_ok=True)
    assert open_experiment(run, cpu).step == 20


def test_a_checkpoint_of_files_that_fit_but_arrays_that_do_not_is_removed_as_told(run, trained, cpu):
    """Only whoever writes a manifest for it can make one."""
    facts = {name: value for name, value in read_manifest(run / "checkpoints" / "20").items() if name != "files"}
    arrays = dict.fromkeys(facts["arrays"], "00000000")
    write_manifest(run / "checkpoints" / "20", facts | {"arrays": arrays})
    for call, more in ((open_experiment, {"step": 20}), (train, {})):
        config = [] if call is open_experiment else [change(build_config(), {"total_steps": 21})]
        line = refusal(call, *config, run, cpu, **more)
        told = re.search(r"(\S.*/20): what is read is not what was saved; remove that folder$", line)
        assert told
    shutil.rmtree(told[1])
    assert open_experiment(run, cpu).step == 10
    # Files that are not of this orbax.
    shutil.copytree(trained / "checkpoints" / "20", run / "checkpoints" / "20")
    for file in (run / "checkpoints" / "20" / "params").rglob("_METADATA"):
        file.write_text("{}")
    write_manifest(run / "checkpoints" / "20", facts)
    assert "is not a checkpoint that can be read" in refusal(open_experiment, run, cpu, step=20)
    # A config of a model that is larger than its checkpoint.
    shutil.rmtree(run / "checkpoints" / "20")
    large = change(Config.load(run), {"model.num_layers": 1024, "model.mlp_dim": 1 << 14})
    large.save(run)
    facts = {n: v for n, v in read_manifest(run / "checkpoints" / "10").items() if n != "files"}
    write_manifest(run / "checkpoints" / "10", facts | {"settings": large.to_json()})
    assert refusal(open_experiment, run, cpu).endswith("restore the one that belongs to it")
    shutil.copytree(trained / "checkpoints", run / "checkpoints", dirs_exist_ok=True)
    shutil.copy(trained / "config.json", run)
    assert open_experiment(run, cpu).step == 20


def test_a_checkpoint_that_is_none_is_named(run, capsys):
    folder = run / "checkpoints"
    facts = {name: value for name, value in read_manifest(folder / "10").items() if name != "files"}
    for changes, said in (
        ({"step": 20}, "its manifest is of step 20"),
        ({"nats_per_token": "low"}, "its manifest has values that cannot be"),
        ({"arrays": []}, "its manifest has values that cannot be"),
    ):
        write_manifest(folder / "10", facts | changes)
        assert refusal(check_checkpoint, folder, 10) == said
        assert SavedParams(run).steps == [20]
        assert f"checkpoint 10 is not used: {said}" in capsys.readouterr().err
    shutil.move(folder / "10", run / "10")
    (folder / "10").symlink_to(run / "10")
    assert refusal(check_checkpoint, folder, 10) == "it is a link, and must be the folder itself"


def test_what_is_a_link_or_too_long_is_put_right(tmp_path, cpu):
    (tmp_path / "workdir").mkdir()
    (tmp_path / "other").write_text("{}")
    file = tmp_path / "workdir" / "config.json"
    file.symlink_to(tmp_path / "other")
    assert refusal(check_inside, file.parent, file).endswith("put the file itself there")
    file.unlink()
    file.write_text("{}")
    check_inside(file.parent, file, 2)
    assert refusal(check_inside, file.parent, file, 1).endswith("restore it")
    # Deep in it, and what is no file: nothing of it is read.
    odd = tmp_path / "workdir" / "checkpoints" / "7" / "odd"
    odd.parent.mkdir(parents=True)
    os.mkfifo(odd)
    assert refusal(check_entries, tmp_path / "workdir").endswith("is a pipe or device; remove it")
    with pytest.raises(OSError, match="it is no regular file"):  # of a manifest that names it
        hash_file(odd)
    odd.unlink()
    with odd.open("wb") as long:
        long.truncate(1 << 40)
    assert refusal(check_entries, tmp_path / "workdir").endswith("remove it, or restore it from a copy")
    odd.unlink()
    odd.symlink_to(tmp_path / "other")
    workdir = tmp_path / "workdir"
    for call in (
        lambda: check_entries(workdir),
        lambda: Config.load(workdir),
        lambda: train(build_config(), workdir, cpu),
        lambda: write_report([workdir]),
    ):
        assert refusal(call).endswith("put the file itself there")
    odd.unlink()
    odd.symlink_to(file)  # inside: as good as the file
    check_entries(tmp_path / "workdir")


def test_what_verify_finds_is_mended_as_it_says(run):
    """A whole workdir as versions before wrote it, with a torn record, then one whose tokenizer is another."""
    whole = verify(run)
    assert whole.checked > 20 and not whole.bad
    for split in ("train", "valid", "test"):
        file = run / "windows" / f"{split}.json"
        values = json.loads(file.read_text()) | {"format_version": 1}
        file.write_text(json.dumps({n: v for n, v in values.items() if n not in ("digest", "sha256")}))
    for step in (10, 20):
        folder = run / "checkpoints" / str(step)
        (folder / MANIFEST).unlink()
        (folder / "meta").mkdir()
        (folder / "meta" / "metadata").write_text('{"nats_per_token": 5.0}')
    (run / "checkpoints" / "30.orbax-checkpoint-tmp").mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    before = verify(run).bad
    for part in ("train.py and --repair give it one", "give it some", "is torn, by a kill", "half-written"):
        assert any(part in line for line in before), before
    done = list(repair(run))
    assert len(done) == 3 + 2 + 1 + 1 and not verify(run).bad, done
    values = json.loads((run / "windows" / "valid.json").read_text())
    (run / "windows" / "valid.json").write_text(signed(values | {"tokenizer": "0" * 64}))
    (line,) = verify(run).bad
    assert line.endswith("restore the tokenizer from a copy, or prepare again")
    (run / "windows" / "valid.json").unlink()
    prepare(build_config(), run)
    assert not verify(run).bad
