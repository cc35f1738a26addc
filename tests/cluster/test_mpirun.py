"""launch/cluster/mpirun.sh with Open MPI on two machines, reached over ssh: stopped, it goes on; equal losses."""

import os
import re
import signal
import subprocess
import sys

import pytest
from cluster.conftest import FLAGS, SECONDS, assert_same_losses, missing, wait_for_step, wait_until
from cluster.machines import machines

pytestmark = pytest.mark.cluster
SCRIPT = "launch/cluster/mpirun.sh"
SSHD = """\
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PidFile none
"""
SSH = "IdentityFile {folder}/user\nStrictHostKeyChecking no\nUserKnownHostsFile {folder}/known\nLogLevel ERROR\n"


@pytest.fixture
def nodes(network, tmp_path_factory):
    """Two machines, the first of which may log in on the second, and the variables that mpirun.sh needs for that."""
    if lacking := missing("mpirun", "ssh", "ssh-keygen", "/usr/sbin/sshd"):
        pytest.skip(f"{lacking} missing: apt-get install openmpi-bin openssh-server")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    for name, text in (("sshd", SSHD), ("ssh", SSH)):
        (folder / name).write_text(text.format(folder=folder))
    environ = {"OMPI_MCA_plm_rsh_agent": f"ssh -F {folder}/ssh", "HOSTS": "node1,node2", "PYTHON": sys.executable}
    with machines(folder, "node1", "node2") as (one, two):
        two.run("sh", "-c", "mount -t tmpfs run /run && mkdir /run/sshd")
        daemon = two.start("/usr/sbin/sshd", "-D", "-q", "-f", str(folder / "sshd"))
        wait_until(
            lambda: one.run("ssh", "-F", str(folder / "ssh"), "node2", "true").returncode == 0,
            lambda: "there is no ssh to node2",
        )
        yield one, two, environ
    daemon.wait()


def start(nodes, *flags: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return nodes[0].start(SCRIPT, *flags, env=nodes[2], **pipes)


def pids(words: str) -> list[int]:
    """Processes on any machine of which these are the first words."""
    done = subprocess.run(["pgrep", "-f", f"^{re.escape(words)}"], capture_output=True, text=True, check=False)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_has_saved_and_goes_on(nodes, tmp_path, alone, number, tell):
    flags = (*FLAGS, f"--workdir={tmp_path}", "--config.mesh.processes=2")
    with start(nodes, *flags) as process:
        wait_for_step(tmp_path, 15)
        os.kill(pids(f"/bin/bash {SCRIPT}")[0], number)
        said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number, said
    step = int(re.search(r"stopped at step (\d+) of .*, saved", said)[1])
    with start(nodes, *flags) as process:
        again, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0 and f"resumes at step {step}" in again, again
    tell(said, again, assert_same_losses(tmp_path, alone))


def test_a_process_that_is_killed_ends_the_command(nodes, tmp_path):
    with start(nodes, *FLAGS, f"--workdir={tmp_path}") as process:
        wait_for_step(tmp_path, 5)
        os.kill(
            next(pid for pid in pids(f"{sys.executable} launch/train.py") if on_machine(pid, nodes[1])), signal.SIGKILL
        )
        said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGKILL and "on node node2 exited on signal 9" in said, said


def on_machine(pid: int, machine) -> bool:
    own = os.readlink(f"/proc/{pid}/ns/net")
    return own == os.readlink(f"/proc/{machine.keeper.pid}/ns/net")
