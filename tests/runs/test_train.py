"""A run is its workdir: what is interrupted goes on as if it had not been, on one process and on two."""

import dataclasses
import json
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal, build_config

from tale_jax.data import loader
from tale_jax.evaluation.scoring import Evaluation, Scorer
from tale_jax.runs.experiment import open_experiment
from tale_jax.runs.records import read_metrics
from tale_jax.runs.train import RunHooks, train
from tale_jax.training.checkpoint import Checkpoints
from tale_jax.utils.signals import StopSignals

SMALL = {
    "corpus.num_train_tales": 100,
    "corpus.num_valid_tales": 10,
    "corpus.num_test_tales": 10,
    "model.embed_dim": 32,
    "model.seq_len": 64,
    "metrics.every_steps": 1,
    "precision": "float32",
    "model.dropout": 0.1,
}


def losses(workdir):
    return {r["step"]: r["loss"] for r in read_metrics(workdir)["train"]}


def assert_same_losses(workdir, other, rtol):
    mine, theirs = losses(workdir), losses(other)
    assert mine.keys() == theirs.keys()
    np.testing.assert_allclose(list(mine.values()), [theirs[step] for step in mine], rtol=rtol)


def stop_after(steps, monkeypatch):
    """A SIGTERM with the batch of this number, heard before its step; returns the batches that are taken."""
    taken, original = [], loader.Batches.__next__
    heard, receive = threading.Event(), StopSignals._receive

    def tell(self, number):  # by the thread that watches, so at a moment of its own
        receive(self, number)
        heard.set()

    def next_batch(self):
        taken.append(original(self))
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard.wait(60)
        return taken[-1]

    monkeypatch.setattr(StopSignals, "_receive", tell)
    monkeypatch.setattr(loader.Batches, "__next__", next_batch)
    return taken


@pytest.fixture(scope="module")
def straight(tmp_path_factory, cpu):
    workdir = tmp_path_factory.mktemp("straight")
    train(build_config(**SMALL), workdir, cpu)
    return workdir


def test_a_run_leaves_what_is_promised(straight):
    names = {path.name for path in straight.iterdir()}
    assert {"config.json", "tokenizer", "windows", "checkpoints", "metrics.jsonl", "samples.jsonl", "log.txt"} <= names
    records = read_metrics(straight)
    assert [r["step"] for r in records["train"]] == list(range(1, 21))
    wanted = {"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "data_wait"}
    assert wanted <= set(records["train"][-1])
    assert ("peak_share" in records["train"][-1]) == bool(records["run"][0]["matmul_peak"])  # only of one to be trusted
    assert records["run"][0]["startup_seconds"] > 0 and not records["run"][0]["was_prepared"]
    last = records["valid"][-1]
    assert last["windows"] == 8 < last["split_windows"] and last["nats_per_token_stderr"] > 0
    assert [r["step"] for r in records["valid"]] == [10, 20]
    assert records["run"][0]["floor_nats_per_token"] > 0
    assert records["train"][-1]["loss"] < records["train"][0]["loss"] - 0.5
    samples = [json.loads(line) for line in (straight / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {10, 20} and all(isinstance(s["text"], str) for s in samples)


def test_interrupted_and_resumed_equals_straight_through(straight, tmp_path, cpu, monkeypatch):
    """A SIGTERM after some steps, then the same call: the losses are those of the run that was left alone."""
    taken = stop_after(7, monkeypatch)
    config = build_config(**SMALL)
    outcome = train(config, tmp_path, cpu)
    assert (outcome.step, outcome.signal) == (7, signal.SIGTERM)
    outcome = train(config, tmp_path, cpu)
    assert (outcome.step, outcome.signal) == (20, 0)
    assert len(taken) == 20 and len({batch.tobytes() for batch in taken}) == 20
    assert_same_losses(tmp_path, straight, rtol=1e-5)


def test_a_crash_loses_only_what_came_after_the_checkpoint(straight, tmp_path, cpu, monkeypatch):
    on_metrics = RunHooks.on_metrics

    def crash(self, step, metrics):
        if step == 14:
            raise RuntimeError("power cut")
        on_metrics(self, step, metrics)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(RunHooks, "on_metrics", crash)
        train(build_config(**SMALL), tmp_path, cpu)
    assert Checkpoints(tmp_path, 1).latest == 10
    assert train(build_config(**SMALL), tmp_path, cpu).step == 20
    assert_same_losses(tmp_path, straight, rtol=1e-5)


@pytest.mark.slow
def test_a_run_with_ema_and_short_windows_goes_on_as_if_never_stopped(tmp_path, cpu, monkeypatch):
    """Stopped in each phase and at none; the whole state at the end is the same, to the bit."""
    settings = SMALL | {
        "total_steps": 8,
        "evaluate.every_steps": 0,
        "checkpoint.every_steps": 0,
        "sample.every_steps": 8,
        "ema.decay": 0.8,
        "schedule.short_seq_fraction": 0.5,
        "model.embedding_dropout": 0.1,
        "remat": "block",
    }
    config = build_config(**settings)
    outcome = train(config, tmp_path / "straight", cpu)
    seen = []
    for step in (2, 6):
        with monkeypatch.context() as patch:
            stop_after(step - (seen[-1] if seen else 0), patch)
            seen.append(train(config, tmp_path / "stopped", cpu).step)
    assert seen == [2, 6] and train(config, tmp_path / "stopped", cpu).step == outcome.step == 8
    mine, theirs = losses(tmp_path / "stopped"), losses(tmp_path / "straight")
    assert mine == theirs and len(mine) == 8
    for weights in ("ema", "last"):
        found, wanted = (
            open_experiment(tmp_path / name, cpu, weights=weights).params for name in ("stopped", "straight")
        )
        assert_trees_equal(found, wanted)
    last = read_metrics(tmp_path / "straight")["valid"][-1]["nats_per_token"]
    assert last == pytest.approx(ema_loss(tmp_path / "straight", cpu), rel=1e-5)


def ema_loss(workdir, cpu):
    """Validation loss of what `--weights=auto` opens, on the windows that the run used."""
    opened = open_experiment(workdir, cpu)
    assert opened.weights == "ema"
    evaluate = opened.config.evaluate
    scorer = Scorer(opened.model, opened.tokenizer, evaluate.batch_size)
    evaluation = Evaluation(
        workdir, "valid", scorer, opened.tokenizer, opened.config.windows, max_windows=evaluate.max_windows
    )
    return evaluation(opened.params)["nats_per_token"]


def test_a_finished_run_says_so_and_changes_nothing(straight, cpu):
    def written():
        files = [path for path in straight.rglob("*") if path.is_file() and path.name not in ("log.txt", ".lock")]
        return {path: path.stat().st_mtime_ns for path in files}

    before = written()
    outcome = train(build_config(**SMALL), straight, cpu)
    assert (outcome.step, outcome.total_steps) == (20, 20)
    assert written() == before


def test_another_experiment_is_refused_before_anything_is_written(straight, cpu):
    before = (straight / "config.json").read_text()
    with pytest.raises(ValueError, match=r"model.num_heads=4 must be 2 to go on .* or give another --workdir"):
        train(build_config(**SMALL | {"model.num_heads": 4}), straight, cpu)
    assert (straight / "config.json").read_text() == before


def test_a_longer_run_goes_on(straight, tmp_path, cpu):
    workdir = tmp_path / "longer"
    shutil.copytree(straight, workdir)
    assert train(build_config(**SMALL | {"total_steps": 22}), workdir, cpu).step == 22
    assert [r["step"] for r in read_metrics(workdir)["train"]] == list(range(1, 23))


@pytest.mark.slow
def test_divergence_is_one_line_and_goes_on_with_another_rate(tmp_path, cpu):
    """From the first step, or the last checkpoint whose weights gave a loss; nothing that is not finite is saved."""
    wild = {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0, "checkpoint.every_steps": 1}
    with pytest.raises(ValueError, match=r"(is (nan|inf)|far above).* the 10th update in a row .*diverged") as error:
        train(build_config(**SMALL | wild), tmp_path, cpu)
    assert "\n" not in str(error.value)
    assert (tmp_path / "damaged").is_dir()
    skipped = read_metrics(tmp_path)["skipped"]
    assert len(skipped) == 10 and all(len(record["windows"]) == 4 for record in skipped)
    assert train(build_config(**SMALL | wild | {"optimizer.learning_rate": 1e-3}), tmp_path, cpu).step == 20
    changed = [record["changed"] for record in read_metrics(tmp_path)["run"] if "changed" in record]
    assert changed == [{"optimizer.learning_rate": [1e30, 1e-3]}]
    assert all(np.isfinite(list(losses(tmp_path).values())))


@pytest.mark.parametrize("ends", [pytest.param("finished", marks=pytest.mark.slow), "failed"])
def test_the_threads_that_read_batches_end_with_the_run(straight, tmp_path, cpu, monkeypatch, ends):
    closed, close = [], loader.Batches.close
    monkeypatch.setattr(loader.Batches, "close", lambda self: [closed.append(self), close(self)])
    shutil.copytree(straight, tmp_path / "run")
    config = build_config(**SMALL | {"total_steps": 21})
    if ends == "failed":
        monkeypatch.setattr(RunHooks, "on_metrics", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run", cpu)
    else:
        train(config, tmp_path / "run", cpu)
    assert {batches._iterator for batches in closed} == {None}  # `set_state` closes them, too


def test_memory_that_runs_out_is_told_with_what_is_kept_and_what_to_do(straight, tmp_path, cpu, monkeypatch):
    """Whatever type of error the platform raises for it."""
    shutil.copytree(straight, tmp_path / "run")

    def fail(self, step, metrics):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    monkeypatch.setattr(RunHooks, "on_metrics", fail)
    with pytest.raises(MemoryError, match=r"the checkpoint of step 20 is intact.*--config.remat=block"):
        train(build_config(**SMALL | {"total_steps": 22}), tmp_path / "run", cpu)


def test_a_run_that_cannot_fit_is_refused_before_a_step(tmp_path, cpu):
    config = build_config(**SMALL | {"backend.memory_gb": 1e-3})
    with pytest.raises(ValueError, match=r"this run needs at least .* may use 1 MB; no change .* make the model"):
        train(config, tmp_path, cpu)
    assert not list(tmp_path.iterdir())
    config = build_config(**SMALL | {"backend.memory_gb": 1e-3, "backend.ignore_memory": True, "total_steps": 1})
    assert train(config, tmp_path, cpu).step == 1


# Training text scored beside validation.


def test_training_text_is_scored_without_the_openings_that_follow(straight, cpu):
    """The first document of 16 training windows, as a plain evaluation of these documents has it."""
    opened = open_experiment(straight, cpu)
    scorer = Scorer(opened.model, opened.tokenizer, 4)
    whole = Evaluation(straight, "train", scorer, opened.tokenizer, "document")
    starts = loader.window_starts(whole.tokens, 64, opened.tokenizer.bos_id)
    chosen = {starts[i * len(starts) // 16] for i in range(16)}
    whole.spans = [span for span in whole.spans if span.start in chosen]
    assert len(whole.spans) == 16
    found = read_metrics(straight)["valid"][-1]["train_nats_per_token"]
    assert found == pytest.approx(whole(opened.params)["nats_per_token"], rel=1e-5)


def test_a_run_on_a_stream_scores_no_training_text(tmp_path, cpu):
    train(build_config(**SMALL | {"windows": "stream", "total_steps": 2}), tmp_path, cpu)
    assert "train_nats_per_token" not in read_metrics(tmp_path)["valid"][-1]


# Several devices. Several processes: test_processes.py.

# Dropout depends on the order of rows in a batch; with a tiny eps Adam divides rounding noise by itself.
WITHOUT_NOISE = {"model.dropout": 0.0, "optimizer.eps": 1e-4}


@pytest.mark.slow
def test_devices_share_a_run_and_change_no_number(straight, tmp_path, cpu):
    """Also where they do not divide evaluate.batch_size."""
    many = dataclasses.replace(cpu, devices=tuple(jax.devices()[:4]))
    settings = SMALL | WITHOUT_NOISE | {"evaluate.batch_size": 3, "total_steps": 10}
    for name, backend, mesh in (("one", cpu, 1), ("four", many, 2)):
        train(build_config(**settings | {"mesh.fsdp": mesh}), tmp_path / name, backend)
    assert_same_losses(tmp_path / "four", tmp_path / "one", rtol=1e-5)
    found, wanted = (read_metrics(tmp_path / name)["valid"] for name in ("four", "one"))
    for record, other in zip(found, wanted, strict=True):
        for field in ("nats_per_token", "excess_nats_per_token", "train_nats_per_token", "bits_per_byte"):
            assert record[field] == pytest.approx(other[field], rel=1e-5)
        assert record["tokens"] == other["tokens"]
    one, other = ((tmp_path / name / "samples.jsonl").read_text() for name in ("one", "four"))
    assert one == other
