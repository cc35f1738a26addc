"""Every launch script, run as a user runs it, on the embedded corpus: results, and mistakes in one line."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers import run_script, start_script

from tale_jax.utils.locks import LOCK_FILE

TINY = "--config=configs/tales.py:tiny"
FEW = ["--config.corpus.num_train_tales=60", "--config.corpus.num_valid_tales=8", "--config.corpus.num_test_tales=8"]
SMALL = [*FEW, "--config.model.embed_dim=32", "--config.model.seq_len=64", "--config.sample.max_tokens=8"]


def files_of(workdir: Path) -> dict[Path, bytes]:
    """What every file holds, but for the one that says who writes here."""
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != LOCK_FILE}


def flags(workdir: Path, *more: str) -> list[str]:
    return [TINY, f"--workdir={workdir}", *SMALL, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A workdir that prepare.py and train.py made."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    done = run_script("prepare", *flags(workdir))
    assert done.returncode == 0, done.stderr
    assert str(workdir) in done.stdout
    done = run_script("train", *flags(workdir))
    assert done.returncode == 0, done.stderr
    assert str(workdir) in done.stdout
    return workdir


def test_a_finished_run_says_so(finished):
    done = run_script("train", *flags(finished))
    assert done.returncode == 0 and "finished" in done.stdout


def test_evaluate(finished):
    done = run_script(
        "evaluate", f"--workdir={finished}", "--json", "--num_samples=4", "--split=test", "--weights=mean:2"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["split"] == "test" and result["step"] == 20 and result["nats_per_token"] > 0
    assert result["weights"] == "mean:2"
    assert {"excess_nats_per_token", "sample_temperature", "accepted_share", "consistent_share", "copied_share"} <= set(
        result
    )


def test_sample(finished):
    done = run_script("sample", f"--workdir={finished}", "--prompt=Once", "--max_tokens=5", "--num_samples=2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["samples"]) == 2 and result["tokens_per_second"] > 0 and result["weights"] == "last"
    assert all({"text", "tokens", "logprob"} <= set(sample) for sample in result["samples"])


def test_report(finished):
    done = run_script("report", f"--workdir={finished}")
    assert done.returncode == 0, done.stderr
    assert (finished / "report.html").stat().st_size > 10_000 and "report.html" in done.stdout


def test_a_moved_workdir_is_all_that_is_needed(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "moved")
    done = run_script("sample", f"--workdir={tmp_path / 'moved'}", "--max_tokens=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_interrupt_saves_and_the_same_command_goes_on(tmp_path):
    process = start_script("train", *flags(tmp_path / "run", "--config.total_steps=100000"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (metrics.exists() and '"train"' in metrics.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "the same command goes on from there" in stderr and "Traceback" not in stderr
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    done = run_script("train", *flags(tmp_path / "run", f"--config.total_steps={saved + 2}"))
    assert done.returncode == 0, done.stderr
    assert f"resumes at step {saved}" in done.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("train", [TINY, "--workdir={tmp}/x", "--config.model.num_head=3"], "did you mean --config.model.num_heads?"),
        ("train", [TINY, "--workdir={tmp}/x", "--config.model.num_heads=7"], "model.embed_dim=64 must be divisible by"),
        ("train", ["--config=configs/files.py", "--workdir={tmp}/x", "--config.corpus.path={tmp}/no"], "corpus.path="),
        ("train", ["--config=configs/files.py", "--workdir={tmp}/x"], "corpus.path="),
        (
            "train",
            [TINY, "--workdir={tmp}/x", "--config.minutes=1", "--config.passes=2"],
            "passes must not be given where",
        ),
        ("train", [TINY, "--workdir={finished}", *SMALL, "--config.model.num_layers=3"], "num_layers=3 must be 2"),
        ("train", [TINY, "--workdir={finished}", *SMALL, "--config.model.seq_len=128"], "model.seq_len=128"),
        ("train", [TINY, "--workdir={tmp}/file/x"], "file/x"),
        ("prepare", [TINY, "--workdir={finished}", *SMALL, "--config.model.seq_len=128"], "windows of 64 tokens"),
        ("evaluate", ["--workdir={tmp}/nothing"], "does not exist"),
        ("evaluate", ["--workdir={finished}", "--split=train-set"], "--split=train-set must be one of"),
        ("evaluate", ["--workdir={finished}", "--step=7"], "step=7 must be a whole checkpoint"),
        ("evaluate", ["--workdir={finished}", "--weights=ema"], "weights=ema must be what the run kept"),
        ("sample", ["--workdir={finished}", "--weights=mean:9"], "mean:K of the 2 checkpoints up to step 20"),
        ("evaluate", ["--workdir={untrained}"], "must hold a checkpoint"),
        ("sample", ["--workdir={untrained}"], "must hold a checkpoint"),
        ("sample", ["--workdir={broken}"], "must hold a checkpoint"),
        ("sample", ["--workdir={finished}", "--prompt=  "], "prompt="),
        ("sample", ["--workdir={finished}", "--top_p=1.5"], "top_p=1.5 must be above 0 and at most 1"),
        ("sample", ["--workdir={finished}", "--prompt=" + "tale " * 200], "must fit the context of 64"),
        ("report", ["--workdir={tmp}/nothing"], "nothing"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_lost(finished, tmp_path, name, arguments, line):
    (tmp_path / "file").write_text("in the way")
    for folder in ("untrained", "broken"):
        (tmp_path / folder).mkdir()
        shutil.copy(finished / "config.json", tmp_path / folder)
        shutil.copytree(finished / "tokenizer", tmp_path / folder / "tokenizer")
    (tmp_path / "broken" / "checkpoints" / "5").mkdir(parents=True)
    before = files_of(finished)
    places = {"tmp": tmp_path, "finished": finished, "untrained": tmp_path / "untrained", "broken": tmp_path / "broken"}
    done = run_script(name, *(a.format(**places) if "{" in a else a for a in arguments))
    assert done.returncode == 2, done.stderr
    assert line in done.stderr and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert before == files_of(finished)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    done = run_script("train", *flags(tmp_path / "run"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


# Commands that are refused.


def everything_in(folder: Path) -> dict[str, bytes | None]:
    """Every path in a folder, with what is in it."""
    return {str(path): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


FILES = "--config=configs/files.py"
REFUSED = {  # by script: what each is refused for, after it has begun its work
    "train": [
        (FILES, "--config.corpus.path={texts}/no.txt"),
        (FILES, "--config.corpus.path={texts}/short.txt"),
        (FILES, "--config.corpus.path={texts}/binary.txt"),
        (FILES, "--config.corpus.path={texts}/short.txt", "--config.minutes=1"),
        (FILES, "--config.corpus.path={texts}/long.txt", "--config.model.embed_dim=65536"),
        ("--config=configs/tales.py:tiny", "--config.precision=float32", "--config.backend.memory_gb=0.001"),
        ("--config=configs/tales.py:tiny", "--config.tokenizer.path={texts}/binary.txt"),
        ("--config=configs/tales.py:tiny", "--config.mesh.fsdp=7"),
    ],
    "prepare": [
        (FILES, "--config.corpus.path={texts}/binary.txt"),
        (FILES, "--config.corpus.path={texts}/short.txt"),
        (FILES, "--config.corpus.path={texts}/long.txt", "--config.tokenizer.vocab_size=100000"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"), [(script, flags) for script, rows in REFUSED.items() for flags in rows], ids=str
)
@pytest.mark.parametrize("workdir", ["new/deep/run", "there"])
def test_a_command_that_is_refused_leaves_the_files_as_they_were(script, flags, workdir, tmp_path):
    texts, there = tmp_path / "texts", tmp_path / "there"
    for folder in (texts, there):
        folder.mkdir()
    (there / "notes.txt").write_text("of the user")
    (texts / "short.txt").write_text("Once.")
    (texts / "binary.txt").write_bytes(bytes(range(256)) * 50)
    (texts / "long.txt").write_text("\n\n".join(f"The cat number {i} saw {i * i} birds." for i in range(900)))
    before = everything_in(tmp_path)
    done = run_script(script, *(flag.format(texts=texts) for flag in flags), f"--workdir={tmp_path / workdir}")
    assert done.returncode == 2 and len(done.stderr.splitlines()[-1]) > 20, done.stderr
    assert everything_in(tmp_path) == before, done.stderr


@pytest.mark.slow
def test_what_cannot_fit_is_refused_before_its_text_is_read(tmp_path):
    """With what helps: nothing but a smaller model where the weights alone are too many."""
    (tmp_path / "a.txt").write_text("\n\n".join(f"The cat number {i} saw {i * i} birds." for i in range(900)))
    flags = [FILES, f"--config.corpus.path={tmp_path}/a.txt", f"--workdir={tmp_path}/run"]
    done = run_script("train", *flags, "--config.model.embed_dim=32768", "--config.model.num_layers=40")
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "prepare" not in done.stderr and "tokenizer" not in done.stderr.replace(line, "")
    assert "needs at least" in line and "make the model smaller: lower model.embed_dim" in line
    assert "remat=" not in line and "micro_batch_size" not in line
