"""Two writers of one workdir, and readers beside a writer."""

import gc
import json
import time

import pytest
from faults.processes import RECIPE, go_on, held, newest_digests, run, start

from tale_jax.runs.experiment import open_experiment
from tale_jax.runs.verify import verify
from tale_jax.training.checkpoint import digests, read_manifests

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    ("second", "moment"),
    [("train", "preparing:3"), ("train", "stepping:3"), ("train", "saving:20"), ("prepare", "preparing:3")],
)
def test_a_second_writer_is_refused_whatever_the_first_does(whole, tmp_path, second, moment):
    workdir = tmp_path / "run"
    with held(moment, "train", *RECIPE, f"--workdir={workdir}") as first:
        done = run(second, *RECIPE, f"--workdir={workdir}")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"is in use by train (process {first.pid}" in done.stderr
        code, _, stderr = go_on(first)
    assert code == 0, stderr
    assert newest_digests(workdir) == newest_digests(whole)


def test_of_writers_that_start_at_once_one_trains(whole, tmp_path):
    """The others are refused, or come when it has ended and find nothing left to do."""
    workdir = tmp_path / "run"
    processes = [start("train", *RECIPE, f"--workdir={workdir}") for _ in range(4)]
    told = [(*process.communicate(timeout=900), process.returncode) for process in processes]
    assert sorted(code for _, _, code in told) in ([0, 2, 2, 2], [0, 0, 2, 2], [0, 0, 0, 2], [0, 0, 0, 0]), told
    assert all("is in use by train" in stderr for _, stderr, code in told if code == 2), told
    assert newest_digests(workdir) == newest_digests(whole) and not verify(workdir).bad
    runs = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["kind"] == "run" for record in runs) == 1


def test_the_lock_of_a_killed_writer_is_taken_over(whole, tmp_path):
    workdir = tmp_path / "run"
    with held("saving:50", "train", *RECIPE, f"--workdir={workdir}") as process:
        process.kill()
        process.communicate()
    assert run("train", *RECIPE, f"--workdir={workdir}").returncode == 0
    assert newest_digests(workdir) == newest_digests(whole)


@pytest.mark.parametrize("moment", ["saving:45", "saving:70", "deleting:2", "deleting:30"])
def test_readers_beside_half_a_save_read_what_is_whole(whole, tmp_path, moment):
    workdir = tmp_path / "run"
    with held(moment, "train", *RECIPE, f"--workdir={workdir}") as writer:
        assert not verify(workdir).bad
        for name, flags in (("evaluate", ("--num_samples=0",)), ("sample", ("--prompt=Once", "--max_tokens=4"))):
            done = run(name, f"--workdir={workdir}", *flags)
            assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        code, _, stderr = go_on(writer)
    assert code == 0, stderr
    assert newest_digests(workdir) == newest_digests(whole)


# orbax leaves what it was reading when the writer let the checkpoint go; the checkpoint is then chosen anew.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_reader_beside_a_writer_for_200_steps_never_sees_half_a_file(whole, tmp_path, cpu, tell):
    workdir, reads, steps = tmp_path / "run", 0, set()
    open_experiment(whole, cpu)  # what is compiled for reading is compiled now
    writer = start("train", *RECIPE, "--config.total_steps=200", f"--workdir={workdir}")
    try:
        while writer.poll() is None:
            if not read_manifests(workdir / "checkpoints"):
                time.sleep(0.05)
                continue
            opened = open_experiment(workdir, cpu)
            if manifest := read_manifests(workdir / "checkpoints").get(opened.step):  # else it was let go of since
                assert digests({"params": opened.params}).items() <= manifest["arrays"].items()
            assert not verify(workdir).bad
            reads, steps = reads + 1, steps | {opened.step}
    finally:
        writer.kill()
        _, stderr = writer.communicate()
    assert writer.returncode == 0, stderr
    assert newest_digests(workdir)[0] == 200 and not verify(workdir).bad and reads
    gc.collect()  # what orbax left is told here, and not when the suite ends
    tell(f"{reads} reads of {len(steps)} steps beside a run of 200 steps: all whole")
