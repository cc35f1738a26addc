"""Workdirs that earlier versions wrote are read, go on where they stopped, and are given digests.

Each archive in `workdirs/` was written by the version itself: train.py of four steps, and
the result of its evaluate.py beside it.
"""

import json
import math
import tarfile
from pathlib import Path

import pytest

from tale_jax.config import FORMAT, Config, change
from tale_jax.runs.evaluate import evaluate
from tale_jax.runs.experiment import open_experiment
from tale_jax.runs.train import train
from tale_jax.runs.verify import verify

FOLDER = Path(__file__).parent / "workdirs"


def unpacked(name, folder):
    with tarfile.open(FOLDER / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name, json.loads((FOLDER / f"{name}.json").read_text())


@pytest.mark.parametrize("number", [1, 2])
def test_a_workdir_of_an_earlier_format_is_read_and_goes_on(tmp_path, cpu, number, capsys):
    workdir, theirs = unpacked(f"format{number}", tmp_path)
    assert json.loads((workdir / "config.json").read_text())["format"] == number < FORMAT
    mine = evaluate(open_experiment(workdir, cpu), num_samples=0)
    assert "no digests, as earlier versions wrote it" in capsys.readouterr().err
    assert mine["step"] == theirs["step"] == 4 and mine["tokens"] == theirs["tokens"]
    assert math.isclose(mine["nats_per_token"], theirs["nats_per_token"], rel_tol=1e-5)
    assert verify(workdir).bad
    assert train(change(Config.load(workdir), {"total_steps": 6}), workdir, cpu).step == 6
    assert not verify(workdir).bad
    assert json.loads((workdir / "config.json").read_text())["format"] == FORMAT
