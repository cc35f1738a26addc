"""A Slurm cluster of two nodes on this one machine: munge, slurmctld and two slurmd, all settings in a folder.

    python tests/cluster/slurm.py                        # a shell on node1, with sbatch, squeue, scontrol and srun
    python tests/cluster/slurm.py sbatch --wait JOB.sh   # or one command there

It needs root and Debian's packages slurm-wlm and munge. The nodes are `machines`: when the command ends, all is gone.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.machines import Machine, machines

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
NODES = ("node1", "node2")
START_SECONDS = 60.0

# cred_expire: a job that was put back into the queue waits so long, and then a second. Jobs in the partition `urgent`
# take the nodes of others, which have GraceTime to save.
CONF = """\
ClusterName=tales
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed
NodeName=node1,node2 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=tales Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What is to be installed before."""
    places = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
    return [name for name in PROGRAMS if not shutil.which(name, path=places)]


@contextmanager
def slurm(folder: Path) -> Iterator[Machine]:
    """The node on which jobs are submitted; `SLURM_CONF` must be set for its commands: `environ(folder)`.

    Raises:
      RuntimeError: where the cluster does not come up.
    """
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder))
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    socket = folder / "munge.socket"
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    with machines(folder, *NODES) as nodes:
        first = nodes[0]
        daemons = []
        with (folder / "daemons.log").open("w") as log:
            how = {"stdout": log, "stderr": log, "env": environ(folder)}
            daemons.append(first.start("munged", "--foreground", "--force", f"--socket={socket}", *munge, **how))
            _wait(socket.exists, "munged", folder)
            daemons.append(first.start("slurmctld", "-D", "-f", str(conf), **how))
            for node in nodes:
                daemons.append(node.start("slurmd", "-D", "-N", node.name, "-f", str(conf), **how))

        def is_up() -> bool:
            states = first.run("sinfo", "--noheader", "--Node", "--format=%t", env=environ(folder)).stdout.split()
            return len(states) == 4 and set(states) == {"idle"}

        _wait(is_up, "the nodes", folder)
        try:
            yield first
        finally:
            first.run("scancel", "--full", "--signal=KILL", "--user=root", env=environ(folder))
    for daemon in daemons:
        daemon.wait()


def environ(folder: Path) -> dict[str, str]:
    """The variables by which Slurm's commands find this cluster."""
    return {"SLURM_CONF": str(folder / "slurm.conf")}


def _wait(condition, what: str, folder: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > end:
            logs = "".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.log")))
            raise RuntimeError(f"{what} did not come up within {START_SECONDS:.0f} s: {logs}")
        time.sleep(0.2)


if __name__ == "__main__":
    if lacking := missing_programs():
        sys.exit(f"{', '.join(lacking)} missing: apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, slurm(Path(name)) as login:
        command = login.command(*(sys.argv[1:] or ["bash"]))
        code = subprocess.run(command, env=os.environ | environ(Path(name)), check=False).returncode
    sys.exit(code)
