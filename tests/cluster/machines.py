"""Machines of a small network, all on this one: each has a host name, an address, /etc/hosts and processes of its own.

    with machines(folder, "node1", "node2") as (one, two):
        one.run("ping", "-c1", "node2")

They are namespaces of Linux (network, host name, mounts, processes), joined by a pair of virtual cables, and need root.
When the `with` ends, or this process does, all that runs on them is killed.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

SUBNET = "10.97.31"  # of the two; it exists nowhere else than in their namespaces
KEEPER = 'hostname "$0" && mount --bind "$1" /etc/hosts && ip link set lo up && echo ready && read -r _'


class Machine:
    """One of the machines.

    Attributes:
      name: its host name.
      address: of its network interface.
    """

    def __init__(self, name: str, address: str, hosts: Path):
        self.name, self.address = name, address
        apart = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        command = [*apart, "bash", "-c", KEEPER, name, str(hosts)]
        self.keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def wait_until_ready(self) -> None:
        """Raises RuntimeError where such a machine cannot be made."""
        assert self.keeper.stdout and self.keeper.stderr
        if self.keeper.stdout.readline() != b"ready\n":
            raise RuntimeError(f"no machine can be made here: {self.keeper.stderr.read().decode().strip()}")

    def close(self) -> None:
        """Kills all that runs on it."""
        self.keeper.kill()
        self.keeper.communicate()

    def command(self, *words: str) -> list[str]:
        """The words of a command, as they are said on this machine to run it on that one."""
        own = f"/proc/{self.keeper.pid}/ns"
        where = [f"--{kind}={own}/{file}" for kind, file in (("net", "net"), ("uts", "uts"), ("mount", "mnt"))]
        return ["nsenter", *where, f"--pid={own}/pid_for_children", "env", f"--chdir={os.getcwd()}", *words]

    def start(self, *words: str, env: Mapping[str, str] | None = None, **how: Any) -> subprocess.Popen:
        """A process on it."""
        return subprocess.Popen(self.command(*words), env=clean_environ() | (env or {}), **how)

    def run(
        self, *words: str, env: Mapping[str, str] | None = None, timeout: float = 600, **how: Any
    ) -> subprocess.CompletedProcess:
        """Runs a command on it to its end; its output is text."""
        how = {"capture_output": True, "text": True, "timeout": timeout, "check": False} | how
        return subprocess.run(self.command(*words), env=clean_environ() | (env or {}), **how)


def clean_environ() -> dict[str, str]:
    """The variables of this process, without what launchers and tests have set."""
    foreign = (
        "SLURM_",
        "SBATCH_",
        "OMPI_",
        "PMIX_",
        "JAX_COORDINATOR",
        "JAX_NUM",
        "JAX_PROCESS",
        "KUBERNETES_",
        "XLA_FLAGS",
    )
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


@contextmanager
def machines(folder: Path, *names: str, domain: str = "", is_own_loopback: bool = False) -> Iterator[list[Machine]]:
    """Two machines that reach each other.

    Args:
      folder: for their files.
      names: of the two.
      domain: by NAME.domain they are known, too.
      is_own_loopback: each takes its own name for 127.0.1.1, as where Debian's installer has written /etc/hosts.

    Raises:
      RuntimeError: where this user, or this system, cannot make them.
    """
    addresses = [f"{SUBNET}.{number}" for number in range(1, len(names) + 1)]
    with ExitStack() as stack:
        found: list[Machine] = []
        for own, address in zip(names, addresses):
            lines = ["127.0.0.1 localhost"]
            for name, known in zip(names, addresses):
                known = "127.0.1.1" if is_own_loopback and name == own else known
                lines.append(f"{known} {name}" + f" {name}.{domain}" * bool(domain))
            (folder / f"hosts-{own}").write_text("\n".join(lines) + "\n")
            found.append(Machine(own, address, folder / f"hosts-{own}"))
            stack.callback(found[-1].close)
        for machine in found:
            machine.wait_until_ready()
        one, two = (f"/proc/{machine.keeper.pid}" for machine in found)
        pair = ["ip", "link", "add", "cable", "netns", Path(one).name, "type", "veth"]
        _must(subprocess.run([*pair, "peer", "name", "cable", "netns", Path(two).name], capture_output=True, text=True))
        for machine in found:
            _must(machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "cable"))
            _must(machine.run("ip", "link", "set", "cable", "up"))
        yield found


def _must(done: subprocess.CompletedProcess) -> None:
    if done.returncode:
        raise RuntimeError(f"{' '.join(done.args)}: {done.stderr.strip()}")
