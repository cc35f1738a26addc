"""A process of a run over two is killed, at stepping and at saving: the other ends within a minute and names it, what
was saved is whole, and the run goes on to the bits of one that was left alone."""

import signal
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from faults.processes import PATIENCE, RECIPE, is_held, newest_digests, start
from helpers import free_address

from tale_jax.runs.verify import verify

pytestmark = pytest.mark.faults
PROMISED_SECONDS = 60


def start_both(workdir: Path, stack: ExitStack, hold_at: str = "") -> Sequence[subprocess.Popen]:
    """Both processes of a run; process 0, which writes the records, is held where `hold_at` says."""
    place = (f"--coordinator_address={free_address()}", "--num_processes=2", "--config.mesh.processes=2")
    flags = (*RECIPE, f"--workdir={workdir}", *place)
    started = []
    for index in range(2):
        started.append(start("train", *flags, f"--process_id={index}", hold_at="" if index else hold_at))
        stack.callback(started[-1].kill)
    return started


def finish(workdir: Path) -> None:
    with ExitStack() as stack:
        for process in start_both(workdir, stack):
            _, stderr = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, stderr


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("alone")
    finish(workdir)
    return workdir


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("moment", ["stepping:9", "saving:60"])
def test_a_process_that_is_killed_ends_the_other_in_one_line(left_alone, tmp_path, tell, moment, killed):
    with ExitStack() as stack:
        started = start_both(tmp_path, stack, moment)
        assert is_held(started[0])
        started[killed].kill()
        started[0].send_signal(signal.SIGCONT)
        _, stderr = started[1 - killed].communicate(timeout=PROMISED_SECONDS)
        started[killed].communicate()
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert started[1 - killed].returncode == 2 and len(lines) == 1, stderr
    assert f"process {killed} of 2 (" in lines[0] and "is lost" in lines[0] and "is whole" in lines[0]
    assert "Traceback" not in stderr and "Check failure" not in stderr
    finish(tmp_path)
    assert newest_digests(tmp_path) == newest_digests(left_alone)
    assert not verify(tmp_path).bad
    tell(f"process {killed} of 2 was killed at {moment}: {lines[0].removeprefix('error: ')}")
