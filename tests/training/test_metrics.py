"""Records survive kills and restarts, means are means, and no sink ever asks a question."""

import dataclasses
import json
import math
import os
import struct
import sys
import time

import numpy as np
import pytest

from tale_jax.config import MetricsConfig
from tale_jax.runs.records import read_metrics
from tale_jax.training.metrics import JsonLinesSink, Meter, TensorBoardSink, WandbSink, check_extras, open_sinks
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
    assert record["peak_share"] == pytest.approx(0.5) and meter.peak_flops == 4000.0
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
        (
            "tensorboardX",
            {"tensorboard": True},
            r"metrics.tensorboard=True needs tensorboardX, which is not installed; .*tensorboard",
        ),
        ("wandb", {"wandb": "offline"}, r"metrics.wandb=offline needs wandb, which is not installed; .*wandb"),
    ],
)
def test_a_missing_extra_is_told_before_anything_is_written(tmp_path, monkeypatch, module, config, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        open_sinks(dataclasses.replace(OFF, **config), tmp_path, {})
    with pytest.raises(ValueError, match=message):
        check_extras(dataclasses.replace(OFF, **config))
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


# Weights & Biases: offline runs of the real library, read back from the file that `wandb sync` would send.

BLOCK, HEADER = 32768, 7  # bytes, of the format of that file: LevelDB's log


def wandb_records(path):
    """Every record of an offline run so far, as (kind, protobuf)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, found = path.read_bytes(), HEADER, b"", []
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # what is left of a block is too short for a header
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(parts)
            found.append((record.WhichOneof("record_type"), getattr(record, record.WhichOneof("record_type"))))
            parts = b""
    return found


def finished_wandb_records(workdir):
    """The records of the offline runs of a workdir, oldest first; a process of the library's own writes them."""
    found = []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        for _ in range(600):
            if any(kind == "exit" for kind, _ in wandb_records(path)):
                break
            time.sleep(0.1)
        found += wandb_records(path)
    return found


def values_of(items):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture
def wandb(monkeypatch):
    """The library, with no credentials and no settings of whoever runs the tests."""
    library = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return library


def history(records):
    own = ("_step", "_runtime", "_timestamp")
    rows = (values_of(record.item) for kind, record in records if kind == "history")
    return [{name: value for name, value in row.items() if name not in own} for row in rows]


@pytest.mark.usefixtures("wandb")
def test_wandb_records_a_run_and_goes_on_under_its_id(tmp_path):
    settings = {"seed": 3, "model": {"num_layers": 2}}
    config = dataclasses.replace(OFF, wandb="offline", wandb_project="stories")
    for start in (0, 10):
        with open_sinks(config, tmp_path, settings) as sinks:
            sinks.write({"kind": "run", "step": start, "platform": "cpu"})
            sinks.write(train(start + 10, 2.5) | {"grad_norm": 0.5, "time": 1.0})
            sinks.write({"kind": "valid", "step": start + 10, "nats_per_token": 2.0, "time": 1.0})
        time.sleep(1)  # the library names the folder of a run by the second
    records = finished_wandb_records(tmp_path)
    runs = [record for kind, record in records if kind == "run"]
    assert {(run.project, run.display_name) for run in runs} == {("stories", tmp_path.name)}
    assert {run.run_id for run in runs} == {(tmp_path / "wandb_id").read_text().strip()}
    assert values_of(runs[0].config.update).items() >= settings.items()
    updates = [values_of(record.update) for kind, record in records if kind == "config"]
    assert [update["run"]["step"] for update in updates if "run" in update] == [0, 10]
    assert history(records) == [
        {"step": 10, "train/loss": 2.5, "train/grad_norm": 0.5},
        {"step": 10, "valid/nats_per_token": 2.0},
        {"step": 20, "train/loss": 2.5, "train/grad_norm": 0.5},
        {"step": 20, "valid/nats_per_token": 2.0},
    ]
    metrics = [record for kind, record in records if kind == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)


@pytest.mark.usefixtures("wandb")
def test_wandb_takes_steps_that_a_restart_repeats(tmp_path):
    sink = WandbSink(tmp_path, mode="offline", project="p", config={})
    for step in (10, 20, 10):
        sink.write(train(step))
    sink.close()
    assert [row["step"] for row in history(finished_wandb_records(tmp_path))] == [10, 20, 10]


def test_wandb_online_without_credentials_fails_at_once(tmp_path, monkeypatch, wandb):
    """The library is asked, without a question to the user, and a line says what to do."""
    asked = []
    monkeypatch.setattr(wandb, "login", lambda **how: asked.append(how) or False)
    with pytest.raises(ValueError, match=r"^metrics.wandb=online needs credentials.*offline$"):
        WandbSink(tmp_path, mode="online", project="p", config={})
    assert asked == [{"prompt": False, "verify": False}]
    assert not list(tmp_path.iterdir())


def test_wandb_trouble_is_one_line(tmp_path, monkeypatch, wandb):
    def fail(**_):
        raise wandb.errors.CommError("no\nnetwork")

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(
        ValueError, match=r"^metrics.wandb=online .* \(no network\); try --config.metrics.wandb=offline$"
    ):
        WandbSink(tmp_path, mode="online", project="p", config={})


def test_a_share_of_the_peak_is_never_above_one():
    """A step that is faster than the peak that was measured raises it."""
    now = [0.0]
    meter = Meter(tokens_per_step=100, flops_per_token=10.0, peak_flops=4000.0, clock=lambda: now[0])
    shares = []
    for step, seconds in enumerate((1.0, 0.5, 0.1, 0.5), start=1):
        now[0] += seconds
        meter.add(loss=1.0, grad_norm=1.0)
        shares.append(meter.record(step).get("peak_share"))
    assert shares == [None, pytest.approx(0.5), 1.0, pytest.approx(0.2)]
    assert meter.peak_flops == pytest.approx(10_000)
