"""The flags of the run that all launchers start, its losses with one process, and what must be there for them."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cluster import slurm
from cluster.machines import machines
from helpers import start_script

from tale_jax.runs.records import read_metrics

SECONDS = 600.0  # for whatever is waited for, on a machine that is busy
STEPS = 150
FLAGS = (
    "--config=configs/tales.py:tiny",
    f"--config.total_steps={STEPS}",
    "--config.precision=float32",
    "--config.optimizer.name=adamw",  # see tests/runs/test_processes.py
    "--config.optimizer.eps=1e-4",
    "--config.metrics.every_steps=1",
    "--config.evaluate.every_steps=100",
)


@pytest.fixture(scope="session")
def network(tmp_path_factory) -> None:
    """Skips where no machines can be made."""
    try:
        with machines(tmp_path_factory.mktemp("network"), "one", "two") as (_, two):
            assert two.run("getent", "hosts", "one").returncode == 0
    except (RuntimeError, OSError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def login(tmp_path_factory, network):
    """A node of a Slurm cluster of two, on which jobs are submitted."""
    if lacking := slurm.missing_programs():
        pytest.skip(f"{', '.join(lacking)} missing: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    with slurm.slurm(folder) as node:
        node.environ = slurm.environ(folder)
        yield node


@pytest.fixture(scope="session")
def alone(tmp_path_factory) -> dict[int, float]:
    """The losses of the run with one process, by step."""
    workdir = tmp_path_factory.mktemp("alone")
    process = start_script("train", *FLAGS, f"--workdir={workdir}")
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, stderr
    return losses(workdir)


@pytest.fixture
def tell(request) -> Callable[..., None]:
    """What commands of a cluster said, to be shown after all tests."""
    return lambda *lines: request.node.user_properties.append(("cluster", "\n".join(map(str, lines))))


def pytest_terminal_summary(terminalreporter):
    reports = [report for each in terminalreporter.stats.values() for report in each if hasattr(report, "when")]
    told = [pair for report in reports if report.when == "call" for pair in report.user_properties]
    for line in [line for name, line in told if name == "cluster"]:
        terminalreporter.write_sep("-", "cluster")
        terminalreporter.write_line(line)


def missing(*programs: str) -> str:
    """Which of these are not installed."""
    return ", ".join(name for name in programs if not shutil.which(name))


def losses(workdir: Path) -> dict[int, float]:
    """The loss of each step so far."""
    return {record["step"]: record["loss"] for record in read_metrics(workdir).get("train", ())}


def wait_for_step(workdir: Path, step: int, why_not: Callable[[], str] = lambda: "") -> int:
    """Waits until the step is recorded; the last one that is."""
    wait_until(lambda: max(losses(workdir), default=0) >= step, lambda: f"step {step} was not reached: {why_not()}")
    return max(losses(workdir))


def wait_until(condition: Callable[[], bool], why_not: Callable[[], str]) -> None:
    """Fails with `why_not` where that takes too long."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, why_not()
        time.sleep(0.1)


def assert_same_losses(workdir: Path, alone: dict[int, float]) -> str:
    """Within 1e-6 for thirty steps; later, differences of rounding grow as any do. Says how far they are apart."""
    found = losses(workdir)
    assert list(found) == list(alone)
    apart = np.abs(np.array(list(found.values())) / np.array(list(alone.values())) - 1)
    assert apart[:30].max() < 1e-6 and apart.max() < 1e-3, (apart[:30].max(), apart.max())
    return f"losses against one process: {apart[:30].max():.1e} apart in 30 steps, {apart.max():.1e} in {len(apart)}"
