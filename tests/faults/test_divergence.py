"""A step whose loss or gradient is no number, a spike or an overflow, in a real run: its update is left out.

That every bit is then that of a run which never saw the batch is shown in tests/training/test_guard.py; here the whole
program says so, keeps nothing of it, and follows its own advice when training diverges for good.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from faults.processes import PATIENCE, RECIPE, newest_digests, run
from helpers import ROOT

from tale_jax.runs.verify import verify
from tale_jax.training.checkpoint import read_manifests

pytestmark = pytest.mark.faults

BAD = 35  # step that is spoiled, after enough losses to know a spike by
# What the loss of that step is multiplied by, and what the run says of it. 1e37 leaves the loss a number in float32,
# and the square of its gradient none.
SPOILED = {"nan": "the loss is nan", "100": "is far above those before", "1e37": "the gradient norm is inf"}
MAX_DIFFERENCE = 0.02  # nats per token, of the losses after that step to those of a run in which nothing was spoiled


def spoiled_run(steps, factor, workdir, *flags):
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    spoil = [str(ROOT / "tests" / "faults" / "spoiled.py"), f"{','.join(map(str, steps))}:{factor}"]
    command = [sys.executable, *spoil, str(ROOT / "launch" / "train.py"), *RECIPE, f"--workdir={workdir}", *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE)


def records(workdir, kind):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in lines if record["kind"] == kind}


def test_a_spoiled_step_is_left_out_told_and_leaves_the_losses_what_they_were(whole, tmp_path, tell):
    ends = {}
    for factor, reason in SPOILED.items():
        workdir = tmp_path / factor
        done = spoiled_run([BAD], factor, workdir)
        assert done.returncode == 0, done.stderr
        told = [line for line in done.stderr.splitlines() if "it does not count" in line]
        assert len(told) == 1 and told[0].startswith(f"step {BAD}: ") and reason in told[0], done.stderr
        assert list(records(workdir, "skipped")) == [BAD] and records(workdir, "skipped")[BAD]["windows"]
        assert not verify(workdir).bad
        ends[factor] = newest_digests(workdir)
        assert ends[factor][0] == 40
        steps = range(BAD + 1, 41)
        mine, theirs = ([records(each, "train")[step]["loss"] for step in steps] for each in (workdir, whole))
        before = [[records(each, "train")[step]["loss"] for step in range(1, BAD)] for each in (workdir, whole)]
        np.testing.assert_allclose(*before, rtol=1e-5)  # two programs, of one meaning
        worst = float(np.max(np.abs(np.subtract(mine, theirs))))
        tell(f"loss × {factor} at step {BAD}: the {len(mine)} losses afterwards differ by at most {worst:.4f}")
        assert worst < MAX_DIFFERENCE
    assert ends["nan"] == ends["100"] == ends["1e37"]  # however bad it was, nothing of it is left


def test_a_run_that_diverges_ends_and_goes_on_as_it_says(tmp_path):
    workdir = tmp_path / "run"
    done = spoiled_run(range(23, 41), "nan", workdir)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: the loss is nan at step 32, the 10th update in a row that was left out"), line
    # The weights of step 22 are finite, but no step after them counted: they may be where it went wrong.
    assert "the last good checkpoint is that of step 20" in line and not verify(workdir).bad, line
    assert max(read_manifests(workdir / "checkpoints")) == 20
    remedy = re.search(r"--config\.optimizer\.learning_rate=\S+(?=;)", line)
    assert remedy, line
    done = run("train", *RECIPE, f"--workdir={workdir}", remedy[0])
    assert done.returncode == 0 and "resumes at step 20" in done.stderr, done.stderr
    assert newest_digests(workdir)[0] == 40 and not verify(workdir).bad
    losses = [record["loss"] for step, record in records(workdir, "train").items() if step > 20]
    assert len(losses) == 20 and all(isinstance(loss, float) for loss in losses)
    assert "optimizer.learning_rate" in records(workdir, "run")[20]["changed"]


def test_a_spike_stops_a_run_that_wants_it(tmp_path):
    workdir = tmp_path / "run"
    done = spoiled_run([BAD], "100", workdir, "--config.on_spike=stop")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"is far above those before at step {BAD}: training diverged" in done.stderr.splitlines()[-1]
    assert "the last good checkpoint is that of step 34" in done.stderr.splitlines()[-1]
    assert max(read_manifests(workdir / "checkpoints")) == 34 and not verify(workdir).bad
