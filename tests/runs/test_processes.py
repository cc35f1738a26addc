"""Several processes of launch/train.py as one run: equal losses, whatever devices they have and however it goes on
over others; fine-tuning; a hard number of them; signals. One that is killed: faults/test_lost_processes.py."""

import json
import signal
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from helpers import free_address, run_script, start_script

from tale_jax.runs.records import read_metrics

pytestmark = pytest.mark.slow
TINY = ("--config=configs/tales.py:tiny", "--config.precision=float32", "--config.metrics.every_steps=1")


@contextmanager
def processes(workdir, count, *flags, start=None, devices=1, own=(), recipe=TINY):
    """`start` of `count` processes (None: all) of so many devices (each, or one by one) that train together, process i
    with the flags own[i] too; whatever happens, they are gone at the end."""
    counts = [devices] * count if isinstance(devices, int) else devices
    with ExitStack() as stack:
        started, address = [], f"--coordinator_address={free_address()}"
        for index in range(count if start is None else start):
            place = (address, f"--num_processes={count}", f"--process_id={index}")
            more = (*flags, *own[index : index + 1])
            process = start_script("train", *recipe, f"--workdir={workdir}", *place, *more, devices=counts[index])
            started.append(stack.enter_context(process))  # its pipes are closed at the end
            stack.callback(started[-1].kill)
        yield started


def ends(started):
    """Exit code and stderr of each."""
    return [(stderr, process.returncode) for process in started for _, stderr in [process.communicate(timeout=300)]]


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(workdir):
    return {r["step"]: r["loss"] for r in read_metrics(workdir)["train"]}


# Sums in another order are all that differs: what muon makes of them (9e-7 after 30 steps on two devices, 4e-6 on four)
# is to the bit the same on two devices of one process as on two processes.
STEADY = ("--config.optimizer.name=adamw", "--config.optimizer.eps=1e-4")
DROPOUT = ("--config.model.dropout=0.1", "--config.model.embedding_dropout=0.1")
RARE = ("--config.evaluate.every_steps=0", "--config.sample.every_steps=0", "--config.sample.max_tokens=2")


@pytest.mark.parametrize(("count", "fsdp"), [(2, 2), (4, 1)])
def test_processes_train_as_one_and_one_goes_on(tmp_path, count, fsdp):
    """Also where the windows of an evaluation do not divide evenly. What a run has once is written once."""
    settings = (*STEADY, *DROPOUT, "--config.evaluate.batch_size=3", "--config.evaluate.every_steps=15")
    length = ("--config.total_steps=30", *settings)
    assert run_script("train", *TINY, *length, f"--workdir={tmp_path / 'one'}").returncode == 0
    mesh = (f"--config.mesh.processes={count}", f"--config.mesh.fsdp={fsdp}")
    with processes(tmp_path / "more", count, *length, *mesh) as started:
        assert [code for _, code in ends(started)] == [0] * count
    one, more = losses(tmp_path / "one"), losses(tmp_path / "more")
    assert one.keys() == more.keys() and len(one) == 30
    np.testing.assert_allclose(list(more.values()), [one[step] for step in more], rtol=1e-6)
    kinds = [(record["kind"], record["step"]) for record in lines_of(tmp_path / "more" / "metrics.jsonl")]
    assert len(kinds) == len(set(kinds)) == 1 + 30 + 2
    valid = [[r["nats_per_token"] for r in read_metrics(tmp_path / name)["valid"]] for name in ("one", "more")]
    np.testing.assert_allclose(*valid, rtol=1e-6)
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "more")]
    assert samples[0] == samples[1] and samples[0]
    log = (tmp_path / "more" / "log.txt").read_text()
    assert log.count("step 30: validation") == log.count("plan: peak memory") == 1
    longer = ("--config.total_steps=32", f"--workdir={tmp_path / 'more'}", "--config.mesh.processes=0")
    done = run_script("train", *TINY, *settings, *longer)
    assert done.returncode == 0 and max(losses(tmp_path / "more")) == 32, done.stderr
    assert f"num_processes is 1 from here on, and was {count}" in (tmp_path / "more" / "log.txt").read_text()


def test_two_processes_are_two_devices_of_one_to_the_bit(tmp_path):
    """With muon, whose steps enlarge what sums in another order leave, and dropout: the rows are the same."""
    length = ("--config.total_steps=12", *DROPOUT, *RARE)
    with processes(tmp_path / "one", 1, *length, devices=2) as started:
        assert [code for _, code in ends(started)] == [0]
    with processes(tmp_path / "two", 2, *length) as started:
        assert [code for _, code in ends(started)] == [0, 0]
    assert losses(tmp_path / "two") == losses(tmp_path / "one") and len(losses(tmp_path / "one")) == 12


# Each count of processes times each of devices, in an order in which both change, up and down.
GRID = [(1, 1), (2, 2), (4, 1), (1, 4), (2, 1), (4, 4), (1, 2), (4, 2), (2, 4)]
ALL = pytest.param(GRID, marks=pytest.mark.cluster, id="all")


@pytest.mark.parametrize("grid", [pytest.param(GRID[:4], id="four"), ALL])
def test_a_run_goes_on_over_any_processes_and_devices(tmp_path, grid):
    settings = (*STEADY, *DROPOUT, *RARE, "--config.batch_size=16", "--config.schedule.warmup_steps=2")
    settings += ("--config.schedule.final_fraction=1.0",)  # a rate that does not depend on the length
    whole = (*settings, f"--config.total_steps={3 * len(grid)}")
    assert run_script("train", *TINY, *whole, f"--workdir={tmp_path / 'one'}").returncode == 0
    for number, (count, devices) in enumerate(grid):
        length = f"--config.total_steps={3 * number + 3}"
        with processes(tmp_path / "more", count, *settings, length, devices=devices) as started:
            found = ends(started)
            assert [code for _, code in found] == [0] * count, found
    starts = read_metrics(tmp_path / "more")["run"]
    assert [(r["num_processes"], r["num_devices"]) for r in starts] == [(p, p * d) for p, d in grid]
    one, more = losses(tmp_path / "one"), losses(tmp_path / "more")
    assert one.keys() == more.keys() and len(one) == 3 * len(grid)
    np.testing.assert_allclose(list(more.values()), [one[step] for step in more], rtol=3e-6)


def test_mistakes_are_told_in_one_line_by_all_processes(tmp_path):
    """Flags or devices that differ between them; and what one of them finds out for all."""
    alike = "on process 1, too, as on process 0; start all processes with the same flags and as many devices"
    with processes(tmp_path, 2, devices=(1, 2)) as started:
        assert_ended_by(f"error: local_devices=2 must be 1 {alike}", started)
    with processes(tmp_path, 2, own=("--config.seed=0", "--config.seed=1")) as started:
        assert_ended_by(f"error: seed=1 must be 0 {alike}", started)
    assert not (tmp_path / "config.json").exists()
    assert run_script("train", *TINY, *RARE, "--config.total_steps=2", f"--workdir={tmp_path}").returncode == 0
    with processes(tmp_path, 2, *RARE, "--config.total_steps=2", "--config.model.num_heads=4") as started:
        assert_ended_by("error: model.num_heads=4 must be 2 to go on", started)


def assert_ended_by(line, started):
    for stderr, code in ends(started):
        assert code == 2 and [each[: len(line)] for each in stderr.splitlines() if "error: " in each] == [line], stderr


def test_adapters_are_trained_by_two_processes_as_by_one(tmp_path):
    base = tmp_path / "base"
    assert run_script("train", *TINY, *RARE, "--config.total_steps=4", f"--workdir={base}").returncode == 0
    recipe = ("--config=configs/finetune.py:lora", f"--config.base={base}", "--config.corpus.name=tales")
    tales = [f"--config.corpus.num_{split}_tales={n}" for split, n in (("train", 400), ("valid", 40), ("test", 40))]
    recipe += (*tales, *RARE, "--config.precision=float32", "--config.metrics.every_steps=1", "--config.batch_size=4")
    recipe += ("--config.evaluate.max_windows=8", "--config.lora.dropout=0.1")
    found = []
    for count in (1, 2):
        with processes(tmp_path / str(count), count, "--config.total_steps=6", recipe=recipe) as started:
            ended = ends(started)
            assert [code for _, code in ended] == [0] * count, ended
        found.append(losses(tmp_path / str(count)))
        assert (tmp_path / str(count) / "base.json").is_file()
    assert len(found[0]) == 6 and found[0].keys() == found[1].keys()
    np.testing.assert_allclose(list(found[1].values()), list(found[0].values()), rtol=1e-6)
    valid = [read_metrics(tmp_path / str(count))["valid"][-1]["nats_per_token"] for count in (1, 2)]
    np.testing.assert_allclose(*valid, rtol=1e-6)
    with processes(tmp_path / "1", 2, "--config.total_steps=8", recipe=recipe) as started:
        assert [code for _, code in ends(started)] == [0, 0]
    assert max(losses(tmp_path / "1")) == 8


@pytest.mark.parametrize("index", [0, 1])
def test_sigterm_to_one_saves_on_all(tmp_path, index):
    with processes(tmp_path, 2, "--config.total_steps=100000") as started:
        end = time.monotonic() + 240
        while time.monotonic() < end and len(read_metrics(tmp_path).get("train", ())) < 4:
            time.sleep(0.2)
        started[index].send_signal(signal.SIGTERM)
        assert [code for _, code in ends(started)] == [128 + signal.SIGTERM] * 2
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()]
    assert max(saved) == max(losses(tmp_path))


def test_a_process_that_does_not_come_is_an_error_within_a_minute(tmp_path):
    with processes(tmp_path, 3, start=2) as started:
        for stderr, code in ends(started):
            assert code == 2 and "not all of the 3 processes" in stderr and "Check failure" not in stderr
    assert not (tmp_path / "checkpoints").exists()
