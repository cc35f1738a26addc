"""A run is its workdir: what is interrupted goes on as if it had not been."""

import dataclasses
import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from helpers import build_config

from tale_jax import config as config_module
from tale_jax.evaluation.scoring import Evaluation, Scorer
from tale_jax.runs.experiment import open_experiment
from tale_jax.runs.records import read_metrics
from tale_jax.runs.train import train
from tale_jax.training.checkpoint import Checkpoints

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


@pytest.fixture(scope="module")
def straight(tmp_path_factory, cpu):
    workdir = tmp_path_factory.mktemp("straight")
    train(build_config(**SMALL), workdir, cpu)
    return workdir


def test_a_run_leaves_what_the_house_promises(straight):
    names = {path.name for path in straight.iterdir()}
    assert {"config.json", "tokenizer", "windows", "checkpoints", "metrics.jsonl", "samples.jsonl", "log.txt"} <= names
    records = read_metrics(straight)
    assert [r["step"] for r in records["train"]] == list(range(1, 21))
    assert {"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "data_wait", "peak_share"} <= set(
        records["train"][-1]
    )
    assert [r["step"] for r in records["valid"]] == [10, 20]
    assert records["run"][0]["floor_nats_per_token"] > 0
    assert records["train"][-1]["loss"] < records["train"][0]["loss"] - 0.5


def test_interrupted_and_resumed_equals_straight_through(straight, tmp_path, cpu, monkeypatch):
    """A SIGTERM after some steps, then the same call: the losses are those of the run that was left alone."""

    taken, original = [], data.Batches.__next__

    def next_batch(self):
        batch = original(self)
        taken.append(batch)
        if len(taken) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    monkeypatch.setattr(data.Batches, "__next__", next_batch)
    config = build_config(**SMALL)
    outcome = train(config, tmp_path, cpu)
    assert (outcome.step, outcome.signal) == (7, signal.SIGTERM)
    outcome = train(config, tmp_path, cpu)
    assert (outcome.step, outcome.signal) == (20, 0)
    assert len(taken) == 20
    assert len({batch.tobytes() for batch in taken}) == 20
    mine, theirs = losses(tmp_path), losses(straight)
    np.testing.assert_allclose([mine[s] for s in range(1, 21)], [theirs[s] for s in range(1, 21)], rtol=1e-5)


def test_a_crash_loses_only_what_came_after_the_checkpoint(straight, tmp_path, cpu, monkeypatch):
    from tale_jax.training import loop

    def crash(self, record):
        if record["step"] == 14:
            raise RuntimeError("power cut")
        return original(self, record)

    original = loop._Observer.record
    monkeypatch.setattr(loop._Observer, "record", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train(build_config(**SMALL), tmp_path, cpu)
    monkeypatch.undo()
    assert train(build_config(**SMALL), tmp_path, cpu).step == 20
    mine, theirs = losses(tmp_path), losses(straight)
    np.testing.assert_allclose([mine[s] for s in range(1, 21)], [theirs[s] for s in range(1, 21)], rtol=1e-5)


def test_a_run_with_average_and_short_windows_goes_on_as_if_never_stopped(tmp_path, cpu, monkeypatch):
    """Stopped in each phase and at none; the whole state at the end is the same, to the bit."""
    settings = SMALL | {
        "total_steps": 8,
        "evaluate.every_steps": 0,
        "checkpoint.every_steps": 0,
        "sample.every_steps": 8,
    }
    settings |= {"ema.decay": 0.8, "schedule.short_seq_fraction": 0.5, "model.embedding_dropout": 0.1, "remat": "block"}
    config = build_config(**settings, **{"optimizer.momentum_warmup_steps": 5, "optimizer.cautious": True})
    outcome = train(config, tmp_path / "straight", cpu)
    seen = []
    for at in (2, 6):
        stop_after(at - (seen[-1] if seen else 0), monkeypatch)
        seen.append(train(config, tmp_path / "stopped", cpu).step)
        monkeypatch.undo()
    assert seen == [2, 6] and train(config, tmp_path / "stopped", cpu).step == outcome.step == 8
    mine, theirs = losses(tmp_path / "stopped"), losses(tmp_path / "straight")
    assert mine == theirs and len(mine) == 8
    for weights in ("ema", "last"):
        one, other = (open_experiment(tmp_path / name, weights=weights).params for name in ("straight", "stopped"))
        jax.tree_util.tree_map(np.testing.assert_array_equal, one, other)
    assert read_metrics(tmp_path / "straight")["valid"][-1]["nats_per_token"] == pytest.approx(
        served_loss(tmp_path / "straight"), rel=1e-5
    )


def test_a_run_that_begins_with_small_batches_goes_on_as_if_never_stopped(tmp_path, cpu, monkeypatch):
    """Stopped in either phase: the same losses and weights to the bit, from the windows of a run without the phase."""
    from tale_jax.training.step import Trainer

    settings = SMALL | {"total_steps": 8, "evaluate.every_steps": 0, "checkpoint.every_steps": 0}
    settings |= {"sample.every_steps": 8, "schedule.short_seq_fraction": 0.25, "optimizer.momentum_warmup_steps": 5}
    small = settings | {"schedule.small_fraction": 0.5, "schedule.small_divisor": 4}
    placed, place = [], Trainer.place
    monkeypatch.setattr(Trainer, "place", lambda self, windows: [placed.append(windows), place(self, windows)][1])

    def run(name, settings):
        begin = len(placed)
        step = train(build_config(**settings), tmp_path / name, cpu).step
        return step, [windows for windows in placed[begin:] if windows.shape[1] in (33, 65)]

    _, plain = run("plain", settings)
    step, parts = run("straight", small)
    assert step == 8 and [len(windows) for windows in parts[:20]] == [2] * 8 + [1] * 8 + [4] * 4
    scored = plain[8:]  # validation, with windows of its own
    assert parts[20:] and all(map(np.array_equal, parts[20:], scored))
    np.testing.assert_array_equal(np.concatenate(parts[:8]), np.concatenate(plain[:2]))
    np.testing.assert_array_equal(np.concatenate(parts[8:20]), np.concatenate(plain[2:8]))
    seen = []
    for at in (3, 6):
        with monkeypatch.context() as patch:
            stop_after(at - (seen[-1] if seen else 0), patch)
            seen.append(run("stopped", small)[0])
    assert seen == [3, 6] and run("stopped", small)[0] == 8
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight") and len(losses(tmp_path / "stopped")) == 8
    one, other = (open_experiment(tmp_path / name).params for name in ("straight", "stopped"))
    jax.tree_util.tree_map(np.testing.assert_array_equal, one, other)
    with pytest.raises(ValueError, match=r"total_steps=9 must be 8 to go on"):
        run("stopped", small | {"total_steps": 9})


def stop_after(steps, monkeypatch):
    """A SIGTERM with the batch of this number."""

    taken, original = [], data.Batches.__next__

    def next_batch(self):
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(data.Batches, "__next__", next_batch)


def served_loss(workdir):
    """Validation loss of what `--weights=auto` opens, on the windows that the run used."""
    opened = open_experiment(workdir)
    assert opened.weights == "ema"
    scorer = Scorer(opened.model, opened.tokenizer, opened.config.evaluate.batch_size)
    most = opened.config.evaluate.max_windows
    how = opened.tokenizer, opened.config.windows
    return Evaluation(workdir, "valid", scorer, *how, max_windows=most)(opened.params)["nats_per_token"]


def test_a_finished_run_says_so_and_changes_nothing(straight, cpu):
    before = {
        path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file() and "log" not in path.name
    }
    outcome = train(build_config(**SMALL), straight, cpu)
    assert (outcome.step, outcome.total_steps) == (20, 20)
    del before[straight / "config.json"]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()}.items()


def test_another_experiment_is_refused_before_anything_is_written(straight, cpu):
    before = (straight / "config.json").read_text()
    with pytest.raises(ValueError, match=r"model.num_heads=4 must be 2 to go on .* or give another --workdir"):
        train(build_config(**SMALL | {"model.num_heads": 4}), straight, cpu)
    assert (straight / "config.json").read_text() == before


def test_a_longer_run_goes_on(straight, tmp_path, cpu):
    import shutil

    workdir = tmp_path / "longer"
    shutil.copytree(straight, workdir)
    assert train(build_config(**SMALL | {"total_steps": 22}), workdir, cpu).step == 22
    assert [r["step"] for r in read_metrics(workdir)["train"]] == list(range(1, 23))


def test_divergence_is_one_line_and_keeps_the_checkpoint(tmp_path, cpu):
    wild = {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0, "checkpoint.every_steps": 1}
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+: training diverged") as error:
        train(build_config(**SMALL | wild), tmp_path, cpu)
    assert "\n" not in str(error.value)
    assert Checkpoints(tmp_path, 1).latest is not None


def test_every_setting_is_read(tmp_path, cpu, monkeypatch):
    """Two steps of a run read every leaf of the config: a key that nothing reads would be a lie."""
    read = set()

    def watch(cls):
        original = cls.__getattribute__

        def getattribute(self, name):
            read.add((cls.__name__, name))
            return original(self, name)

        monkeypatch.setattr(cls, "__getattribute__", getattribute, raising=False)

    classes = [c for c in vars(config_module).values() if dataclasses.is_dataclass(c)]
    config = build_config(**SMALL | {"total_steps": 2, "evaluate.every_steps": 1, "metrics.tensorboard": True})
    for cls in classes:
        watch(cls)
    asdict = dataclasses.asdict  # writing all is not reading each
    monkeypatch.setattr(dataclasses, "asdict", lambda x: {} if isinstance(x, config_module.Config) else asdict(x))
    monkeypatch.setattr(config_module.Config, "save", lambda self, workdir: None)
    monkeypatch.setattr(config_module, "check", lambda config: None)
    train(config, tmp_path, cpu)
    corpus = "path max_train_bytes field hub_name hub_config train_split valid_split test_split held_out".split()
    elsewhere = {("CorpusConfig", name) for name in corpus} | {  # of other corpora, schedules and scripts
        ("MetricsConfig", "wandb_project"),
        ("ScheduleConfig", "decay_fraction"),
        ("ScheduleConfig", "seq_len_divisor"),
        ("ScheduleConfig", "small_divisor"),
        ("BackendConfig", "platform"),
        ("Config", "backend"),
    }
    unread = {
        (cls.__name__, field.name) for cls in classes for field in dataclasses.fields(cls)
        if (cls.__name__, field.name) not in read | elsewhere and cls.__name__.endswith("Config")
    }  # fmt: skip
    assert not unread


def test_a_second_signal_acts_as_usual(tmp_path):

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    with _signals() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        while not stop:  # two at once would be taken for one
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert stop == [signal.SIGINT]


def test_samples_along_training_are_kept(straight):
    samples = [json.loads(line) for line in (straight / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {10, 20} and all(isinstance(s["text"], str) for s in samples)
