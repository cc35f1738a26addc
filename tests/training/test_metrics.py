"""Records survive kills and restarts, means are means, and no sink ever asks a question."""

import dataclasses
import json
import math
import sys
import types

import numpy as np
import pytest

from tale_jax.config import MetricsConfig
from tale_jax.runs.records import read_metrics
from tale_jax.training.metrics import JsonLinesSink, Meter, TensorBoardSink, WandbSink, open_sinks
from tale_jax.utils.files import read_json_lines

OFF = MetricsConfig(every_steps=10, tensorboard=False, wandb="off", wandb_project="p")


def write(workdir, *records):
    sink = JsonLinesSink(workdir / "metrics.jsonl")
    for record in records:
        sink.write(record)
    sink.close()


def train(step, loss=1.0):
    return {"kind": "train", "step": step, "loss": loss}


def test_each_record_is_on_disk_at_once(tmp_path):
    sink = JsonLinesSink(tmp_path / "metrics.jsonl")
    sink.write(train(1))
    assert read_json_lines(tmp_path / "metrics.jsonl") == [train(1)]
    sink.close()


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_torn_by_a_kill_is_skipped_then_repaired(tmp_path, cut):
    write(tmp_path, train(1), train(2))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [r["step"] for r in read_metrics(tmp_path)["train"]] == ([1, 2] if cut == 1 else [1])
    write(tmp_path, train(3))
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == ([1, 2, 3] if cut == 1 else [1, 3])


def test_a_torn_character_does_no_harm(tmp_path):
    (tmp_path / "samples.jsonl").write_bytes('{"text": "a"}\n{"text": "é'.encode()[:-1])
    assert read_json_lines(tmp_path / "samples.jsonl") == [{"text": "a"}]
    assert read_json_lines(tmp_path / "missing.jsonl") == []


def test_numbers_are_plain_json(tmp_path):
    write(tmp_path, {"kind": "train", "step": np.int64(3), "loss": np.float32("nan"), "grad_norm": math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "kind": "train", "step": 3, "loss": None, "grad_norm": None
    }  # fmt: skip


def test_a_restart_supersedes_what_stood_beyond_it(tmp_path):
    run = {"kind": "run", "step": 0}
    valid = {"kind": "valid", "step": 30}
    write(tmp_path, run, train(10), train(20), train(30), valid, run | {"step": 20}, train(30, 2.0), train(40))
    records = read_metrics(tmp_path)
    assert records["train"] == [train(10), train(20), train(30, 2.0), train(40)]
    assert records["valid"] == []
    assert [record["step"] for record in records["run"]] == [0, 20]


def test_a_step_told_twice_counts_once(tmp_path):
    write(tmp_path, train(10, 1.0), train(10, 2.0), {"no": "kind"})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("[1]\n7\n\n")
    assert read_metrics(tmp_path) == {"train": [train(10, 2.0)]}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_meter_averages_since_the_last_record():
    clock = Clock()
    meter = Meter(tokens_per_step=100, flops_per_token=10.0, peak_flops=4000.0, tokens=1000, clock=clock)
    clock.now += 60  # compiling
    meter.add(loss=9.0, grad_norm=1.0, learning_rate=0.1)
    for loss in (1.0, 3.0):
        with meter.waiting():
            clock.now += 0.1
        clock.now += 0.4
        meter.add(loss=loss, grad_norm=loss, learning_rate=0.2)
    record = meter.record(3)
    assert record["loss"] == pytest.approx(13 / 3)
    assert (record["tokens"], record["learning_rate"], record["step"]) == (1300, 0.2, 3)
    assert record["tokens_per_second"] == pytest.approx(200)
    assert record["data_wait"] == pytest.approx(0.2)
    assert record["peak_share"] == pytest.approx(0.5)
    with meter.paused():  # evaluation
        clock.now += 30
    clock.now += 0.25
    meter.add(loss=2.0, grad_norm=1.0, learning_rate=0.3)
    record = meter.record(4)
    assert (record["loss"], record["tokens"]) == (2.0, 1400)
    assert record["tokens_per_second"] == pytest.approx(400)


def test_meter_leaves_out_what_it_cannot_know():
    meter = Meter(tokens_per_step=1)
    meter.add(loss=math.nan, grad_norm=1.0, learning_rate=0.1)
    record = meter.record(1)
    assert math.isnan(record["loss"])
    assert not {"tokens_per_second", "peak_share", "data_wait"} & record.keys()


def test_only_jsonl_unless_asked(tmp_path):
    with open_sinks(OFF, tmp_path, {}) as sinks:
        sinks.write(train(1))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("module", "config", "message"),
    [
        ("tensorboardX", {"tensorboard": True}, r"metrics.tensorboard=True needs the tensorboard extra: pip install"),
        ("wandb", {"wandb": "offline"}, r"metrics.wandb=offline needs the wandb extra: pip install -e \.\[wandb\]"),
    ],
)
def test_a_missing_extra_is_told_before_anything_is_written(tmp_path, monkeypatch, module, config, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        open_sinks(dataclasses.replace(OFF, **config), tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_tensorboard_files_hold_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    sink = TensorBoardSink(tmp_path)
    sink.write({"kind": "run", "step": 0, "platform": "cpu"})
    sink.write(train(10, 2.5))
    sink.write({"kind": "run", "step": 10})
    sink.write(train(20, 1.5))
    sink.close()
    files = sorted(tmp_path.glob("events.*"))
    assert files
    assert any(b"train/loss" in path.read_bytes() for path in files)


class FakeWandb(types.ModuleType):
    """Stands for wandb: notes what it is asked, and has credentials or not."""

    def __init__(self, logged_in=True, error=None):
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=RuntimeError)
        self.calls, self.logged_in, self.error = [], logged_in, error
        self.config = types.SimpleNamespace(update=lambda *_, **__: None)

    def login(self, *, prompt, verify):
        assert prompt is False
        return self.logged_in

    def Settings(self, **settings):  # noqa: N802
        return settings

    def init(self, **arguments):
        if self.error:
            raise RuntimeError(self.error)
        self.calls.append(arguments)
        return self

    def define_metric(self, *_, **__): ...

    def log(self, numbers):
        self.calls.append(numbers)

    def finish(self): ...


def test_wandb_goes_on_under_the_same_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        sink = WandbSink(tmp_path, mode="offline", project="p", config={})
        sink.write({"kind": "run", "step": 0})
        sink.write(train(step))
        sink.close()
    first, logged, second, _ = fake.calls
    assert first["id"] == second["id"]
    assert first["mode"] == "offline"
    assert logged == {"step": 1, "train/loss": 1.0}


def test_wandb_without_credentials_fails_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(logged_in=False))
    with pytest.raises(ValueError, match=r"^metrics.wandb=online needs credentials.*offline$"):
        WandbSink(tmp_path, mode="online", project="p", config={})
    assert not list(tmp_path.iterdir())


def test_wandb_trouble_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(error="no\nnetwork"))
    with pytest.raises(ValueError, match=r"^metrics.wandb=online: no network; metrics.wandb=offline needs no network$"):
        WandbSink(tmp_path, mode="online", project="p", config={})
