"""What a workdir tells of its run is read whatever state the files are in."""

import json
import math

import pytest
from helpers import build_config

from tale_jax.runs.records import RunRecords, read_run


def write(workdir, *records):
    workdir.mkdir(exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return workdir


def test_columns_leave_out_what_was_not_recorded(tmp_path):
    run = read_run(
        write(
            tmp_path / "run",
            {"kind": "run", "step": 0, "params": 5},
            {"kind": "train", "step": 1, "loss": 3.0},
            {"kind": "train", "step": 2, "loss": None, "peak_share": 0.5},
            {"kind": "valid", "step": 3, "nats_per_token": 2.5},
            {"kind": "run", "step": 3, "params": 6},
        )
    )
    assert run.name == "run" and run.step == 3 and run.latest_start["params"] == 6
    steps, losses = run.column("train", "loss")
    assert steps == [1, 2] and losses[0] == 3.0 and math.isnan(losses[1])
    assert run.column("train", "peak_share") == ([2], [0.5]) and run.column("none", "loss") == ([], [])
    assert run.last("valid", "nats_per_token") == 2.5 and run.last("valid", "bits_per_byte") is None
    assert RunRecords("empty", {}, {}, [], []).latest_start == {}


def test_a_config_of_any_format_is_read(tmp_path):
    workdir = write(tmp_path / "run", {"kind": "train", "step": 1, "loss": 3.0})
    assert read_run(workdir).config == {}
    build_config(seed=3).save(workdir)
    config = read_run(workdir).config
    assert config["seed"] == 3 and "format" not in config  # as today's format has it
    for other in ({"seed": 4}, {"format": 10**6, "seed": 4}):  # older than every format, newer than all
        (workdir / "config.json").write_text(json.dumps(other))
        assert read_run(workdir).config == other
    (workdir / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON .*; restore it from a copy, or remove it"):
        read_run(workdir)


def test_samples_of_steps_that_a_crash_repeated_count_once(tmp_path):
    workdir = write(tmp_path / "run", {"kind": "train", "step": 20, "loss": 3.0})
    samples = [(10, 0, "a"), (10, 1, "b"), (20, 0, "lost"), (10, 0, "a"), (10, 1, "b"), (20, 0, "c"), (20, 1, "c")]
    lines = [json.dumps({"step": step, "number": number, "text": text}) for step, number, text in samples]
    (workdir / "samples.jsonl").write_text("\n".join([*lines, '{"step": "x", "text": "y"}', '{"torn']))
    found = [(s["step"], s["text"]) for s in read_run(workdir).samples]
    assert found == [(10, "a"), (10, "b"), (20, "c"), (20, "c")]
