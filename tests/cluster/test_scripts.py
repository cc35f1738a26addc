"""The shell scripts of launch/cluster, read by shellcheck."""

import subprocess
import sys

import pytest
from cluster.conftest import missing
from cluster.machines import clean_environ
from helpers import ROOT

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "cluster").glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    if lacking := missing("shellcheck"):
        pytest.skip(f"{lacking} missing: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert path.stat().st_mode & 0o100, "it is not executable"


def test_a_python_without_ray_says_how_to_get_it(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError(name='ray')\n")
    command = [sys.executable, ROOT / "launch" / "cluster" / "ray_train.py", "--workers=2"]
    environ = clean_environ() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "ray is missing" in done.stderr and "run make env EXTRAS=dev,ray" in done.stderr
