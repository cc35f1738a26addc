"""launch/cluster/ray_train.py on a Ray cluster of this machine: a process that is told to end, and a worker that is
killed, start the run anew; losses are equal."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.conftest import FLAGS, SECONDS, assert_same_losses, losses, wait_for_step, wait_until
from cluster.machines import clean_environ
from helpers import ROOT
from remedies.reached import see

pytestmark = pytest.mark.cluster


def processes_with(words: str) -> list[int]:
    """Processes in whose command these words are."""
    done = subprocess.run(["pgrep", "-f", words], capture_output=True, text=True, check=False)
    return [int(line) for line in done.stdout.split()]


@contextlib.contextmanager
def ray_train(log: Path, *flags: str) -> Iterator[subprocess.Popen]:
    """The command, on a cluster that it starts; it ends with the `with`."""
    pytest.importorskip("ray", reason="make test-cluster installs it")
    command = [sys.executable, "launch/cluster/ray_train.py", "--workers=2", "--cpus=0.5", *flags]
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, log.open("w") as out:  # sockets have short names
        environ = clean_environ() | {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": ""}
        environ |= {"HOME": folder, "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=out)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            see(log.read_text())


def test_a_run_goes_on_when_a_process_and_when_a_worker_ends(tmp_path, alone, tell):
    workdir, log = tmp_path / "run", tmp_path / "log"
    with ray_train(log, *FLAGS, f"--workdir={workdir}") as process:
        ways = {signal.SIGTERM: 1, signal.SIGKILL: 0}  # the second process, and the worker above the first
        for restart, (number, index) in enumerate(ways.items(), 1):
            step = wait_for_step(workdir, max(losses(workdir), default=0) + 15, log.read_text)
            words = f"{workdir} --config.mesh.processes=2 --coordinator_address=.*--process_id={index}"
            [training] = processes_with(words)
            tell(f"signal {number} after step {step}")
            os.kill(training if number == signal.SIGTERM else parent_of(training), number)
            wait_until(lambda n=restart: log.read_text().count("resumes at step") == n, log.read_text)
        assert process.wait(SECONDS) == 0, log.read_text()
    assert not processes_with(f"{workdir} --config.mesh.processes=2")
    said = "\n".join(line for line in log.read_text().splitlines() if "RayTrainWorker" in line or "Error" in line)
    assert "stopped at step" in said and "ended with exit code 143" in log.read_text()
    tell(said, assert_same_losses(workdir, alone))


def test_a_run_that_fails_too_often_is_no_success(tmp_path):
    log = tmp_path / "log"
    with ray_train(
        log, "--max_failures=0", *FLAGS, f"--workdir={tmp_path / 'run'}", "--config.batch_size=-1"
    ) as process:
        assert process.wait(SECONDS) == 1, log.read_text()
    assert "error: batch_size=-1 must" in log.read_text()
    assert "error: the run failed more than 0 times; the last time: " in log.read_text()


def parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])
