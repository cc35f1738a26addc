"""One run that nothing happened to, and how many moments it has."""

import collections
from collections.abc import Mapping
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
