"""launch/cluster/slurm.sh on a real Slurm of two nodes: preempted in each way there is, it goes on; equal losses."""

import re
import sys

import pytest
from cluster.conftest import FLAGS, assert_same_losses, losses, wait_for_step, wait_until
from helpers import ROOT

pytestmark = pytest.mark.cluster


class Job:
    """A job of the cluster, and the file that its output goes to."""

    def __init__(self, login, folder, *words: str):
        self.login, self.log = login, folder / "job.out"
        done = login.run(
            "sbatch", "--parsable", f"--output={self.log}", f"--chdir={ROOT}", *words,
            env=login.environ | {"PYTHON": sys.executable},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    def run(self, *words: str) -> str:
        done = self.login.run(*words, env=self.login.environ)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def field(self, name: str) -> str:
        return re.search(rf"\b{name}=(\S+)", self.run("scontrol", "show", "job", self.number))[1]

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, *states: str) -> None:
        wait_until(lambda: self.field("JobState") in states, lambda: f"{self.field('JobState')}: {self.said()}")


def test_a_job_goes_on_after_each_kind_of_preemption(login, tmp_path, alone, tell):
    workdir = tmp_path / "run"
    job = Job(login, tmp_path, "launch/cluster/slurm.sh", *FLAGS, f"--workdir={workdir}")
    first = "sbatch --partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap=true"
    ways = {
        "its time is nearly over": f"scancel --signal=TERM {job.number}",  # as --signal does it
        "an administrator": f"scontrol requeue {job.number}",
        "a job that goes first": first,
    }
    for number, (way, command) in enumerate(ways.items(), 1):
        step = wait_for_step(workdir, max(losses(workdir), default=0) + 15, job.said)
        job.run(*command.split())
        wait_until(lambda n=number: job.field("Restarts") == str(n), lambda w=way: f"{w}: {job.said()}")
        wait_until(lambda n=number: job.said().count("resumes at step") == n, job.said)
        tell(f"{command} after step {step} ({way}): Restarts={number}")
    job.wait("COMPLETED")
    resumed = re.findall(r"resumes at step (\d+)", job.said())
    saved = re.findall(r"stopped at step (\d+) of", job.said())
    assert resumed == saved and len(saved) == len(ways)  # not a step is lost
    tell(job.run("scontrol", "show", "job", job.number), job.said(), assert_same_losses(workdir, alone))


def test_a_job_that_is_cancelled_has_saved_and_stays_so(login, tmp_path):
    workdir = tmp_path / "run"
    job = Job(login, tmp_path, "launch/cluster/slurm.sh", *FLAGS, f"--workdir={workdir}")
    wait_for_step(workdir, 5, job.said)
    job.run("scancel", job.number)
    job.wait("CANCELLED")
    wait_until(lambda: "saved; the same command goes on" in job.said(), job.said)
    assert (workdir / "checkpoints" / str(max(losses(workdir))) / "manifest.json").is_file()
    assert job.field("Restarts") == "0"


def test_a_job_of_two_tasks_never_trains_with_one(login, tmp_path):
    command = f"{sys.executable} launch/train.py {' '.join(FLAGS)} --workdir={tmp_path / 'run'}"
    job = Job(login, tmp_path, "--nodes=2", "--ntasks=2", f"--wrap={command}")
    job.wait("FAILED")
    assert job.field("ExitCode") == "2:0" and "SLURM_NTASKS=2 tasks were asked for" in job.said()
    assert not (tmp_path / "run").exists()
