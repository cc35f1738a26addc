"""Two machines without a launcher, by flags; each takes its own name for a loopback address, as Debian has it."""

import contextlib
import subprocess
import sys

import pytest
from cluster.conftest import FLAGS, SECONDS, losses
from cluster.machines import machines

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("address", ["node1:8476", "10.97.31.1:8476"])
def test_processes_meet_where_a_name_is_a_loopback_address_at_home(network, tmp_path, address):
    (tmp_path / "network").mkdir()
    flags = [*FLAGS, "--config.total_steps=3", f"--workdir={tmp_path / 'run'}", f"--coordinator_address={address}"]
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(machines(tmp_path / "network", "node1", "node2", is_own_loopback=True))
        assert "127.0.1.1" in nodes[0].run("getent", "hosts", "node1").stdout
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, "launch/train.py", *flags, "--num_processes=2"]
        started = [node.start(*command, f"--process_id={index}", **pipes) for index, node in enumerate(nodes)]
        said = [stack.enter_context(process).communicate(timeout=SECONDS)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert len(losses(tmp_path / "run")) == 3
