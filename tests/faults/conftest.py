"""One run that nothing happened to, and how many moments it has."""

import collections
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from faults.processes import RECIPE, run


@pytest.fixture(scope="session")
def counted(tmp_path_factory) -> tuple[Path, Mapping[str, int]]:
    """A workdir after the whole recipe, and by part of a run how many things it did to files. Not to be written to."""
    folder = tmp_path_factory.mktemp("faults")
    done = run("train", *RECIPE, f"--workdir={folder / 'whole'}", counts=folder / "counts")
    assert done.returncode == 0, done.stderr
    return folder / "whole", collections.Counter((folder / "counts").read_text().split())


@pytest.fixture(scope="session")
def whole(counted) -> Path:
    """A workdir after the whole recipe. Not to be written to."""
    return counted[0]


@pytest.fixture
def tell(request) -> Callable[[str], None]:
    """A line to be shown after all tests, also where they run in several processes: what was tried, and how it went."""
    return lambda line: request.node.user_properties.append(("faults", line))


def pytest_terminal_summary(terminalreporter):
    reports = [report for each in terminalreporter.stats.values() for report in each if hasattr(report, "when")]
    told = [pair for report in reports if report.when == "call" for pair in report.user_properties]
    if lines := [line for name, line in told if name == "faults"]:
        terminalreporter.write_sep("=", "faults that were tried")
        terminalreporter.write_line("\n".join(lines))
