"""Several processes of launch/train.py as one run: equal losses, a hard number of them, one that is killed, signals."""

import signal
import socket
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from helpers import run_script, start_script

from tale_jax.runs.records import read_metrics

pytestmark = pytest.mark.slow
TINY = ("--config=configs/tales.py:tiny", "--config.precision=float32", "--config.metrics.every_steps=1")


@contextmanager
def processes(workdir, count, *flags, start=None):
    """`start` of `count` processes that train together (None: all); whatever happens, they are gone at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}"
    with ExitStack() as stack:
        started = []
        for index in range(count if start is None else start):
            place = (address, f"--num_processes={count}", f"--process_id={index}")
            process = start_script("train", *TINY, f"--workdir={workdir}", *place, *flags)
            started.append(stack.enter_context(process))  # its pipes are closed at the end
            stack.callback(started[-1].kill)
        yield started


def ends(started):
    """Exit code and stderr of each."""
    return [(stderr, process.returncode) for process in started for _, stderr in [process.communicate(timeout=300)]]


def losses(workdir):
    return {r["step"]: r["loss"] for r in read_metrics(workdir)["train"]}


# Muon's orthogonalisation enlarges what sums in another order leave: 1.3e-6 was seen after 24 steps of it.
@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_as_one_and_one_goes_on(tmp_path, count):
    settings = ("--config.optimizer.name=adamw", "--config.optimizer.eps=1e-4")
    length = ("--config.total_steps=30", *settings)
    assert run_script("train", *TINY, *length, f"--workdir={tmp_path / 'one'}").returncode == 0
    with processes(tmp_path / "more", count, *length, f"--config.mesh.processes={count}") as started:
        assert [code for _, code in ends(started)] == [0] * count
    one, more = losses(tmp_path / "one"), losses(tmp_path / "more")
    assert one.keys() == more.keys() and len(one) == 30
    np.testing.assert_allclose(list(more.values()), [one[step] for step in more], rtol=1e-6)
    longer = ("--config.total_steps=32", *settings)
    done = run_script("train", *TINY, *longer, f"--workdir={tmp_path / 'more'}")
    assert done.returncode == 0 and max(losses(tmp_path / "more")) == 32, done.stderr


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_other_in_one_line(tmp_path, killed):
    with processes(tmp_path, 2, "--config.total_steps=100000") as started:
        end = time.monotonic() + 240
        while time.monotonic() < end and not (tmp_path / "checkpoints" / "10" / "manifest.json").is_file():
            time.sleep(0.2)
        started[killed].kill()
        _, stderr = started[1 - killed].communicate(timeout=60)  # the limit that is promised
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert started[1 - killed].returncode == 2 and len(lines) == 1, stderr
    assert f"process {killed} of 2 (" in lines[0] and "is lost" in lines[0] and "is whole" in lines[0]
    assert "Traceback" not in stderr and "Check failure" not in stderr


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
