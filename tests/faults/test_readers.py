"""The scripts that read a workdir, beside a run: each result is right, or one line says that there is nothing yet."""

import collections
import json
import time

import pytest
from faults.processes import PATIENCE, RECIPE, go_on, held, newest_digests, run, start

from tale_jax.runs.verify import verify

pytestmark = pytest.mark.faults

READERS = {
    "evaluate": ("--num_samples=0", "--json"),
    "sample": ("--prompt=Once", "--max_tokens=8", "--temperature=0", "--json"),
    "verify": ("--json",),
    "report": (),
}
LONG = (*RECIPE, "--config.total_steps=200")


def result_of(name, workdir):
    """What a reader found, as it says it, with `step`; None where it says in one line that there is nothing yet."""
    done = run(name, f"--workdir={workdir}", *READERS[name])
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, f"{name}: {done.returncode}, {done.stderr}"
    if done.returncode == 2:
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, f"{name}: {done.stderr}"
        return None
    assert "is not used" not in done.stderr, (
        f"{name}: {done.stderr}"
    )  # nothing that is half there was taken for damaged
    result = {"step": 0} if name == "report" else {"step": 0} | json.loads(done.stdout.splitlines()[-1])
    assert not result.get("bad"), f"{name}: {result}"
    return {field: result[field] for field in ("step", "nats_per_token", "samples") if field in result}


def test_readers_beside_a_run_without_a_checkpoint_say_so(whole, tmp_path):
    workdir = tmp_path / "run"
    with held("stepping:1", "train", *RECIPE, f"--workdir={workdir}") as writer:
        found = {name: result_of(name, workdir) for name in READERS}
        assert found["evaluate"] is None and found["sample"] is None and found["verify"], found
        code, _, stderr = go_on(writer)
    assert code == 0, stderr
    assert newest_digests(workdir) == newest_digests(whole)


def test_readers_beside_a_run_of_200_steps_are_right_and_harm_nothing(tmp_path):
    """What they told of a step is told again of the same step, where it is still kept, when nothing runs."""
    alone, workdir, told = tmp_path / "alone", tmp_path / "run", collections.defaultdict(list)
    done = run("train", *LONG, "--config.checkpoint.keep=100", f"--workdir={alone}")
    assert done.returncode == 0, done.stderr
    writer = start("train", *LONG, "--config.checkpoint.keep=100", f"--workdir={workdir}")
    try:
        while writer.poll() is None:
            if not (workdir / "config.json").is_file():
                time.sleep(0.1)
                continue
            for name in READERS:
                told[name].append(result_of(name, workdir))
    finally:
        if writer.poll() is None:
            writer.kill()
        _, stderr = writer.communicate(timeout=PATIENCE)
    assert writer.returncode == 0, stderr
    assert newest_digests(workdir) == newest_digests(alone) and not verify(workdir).bad
    for name in ("evaluate", "sample"):
        for result in [each for each in told[name] if each][-2:]:
            again = run(name, f"--workdir={alone}", f"--step={result['step']}", *READERS[name])
            assert again.returncode == 0, again.stderr
            same = json.loads(again.stdout.splitlines()[-1])
            assert {field: same[field] for field in result} == result, f"{name} of step {result['step']}"
    counts = {name: f"{sum(map(bool, results))} of {len(results)}" for name, results in told.items()}
    print(f"\nreads that found a checkpoint, beside a run of 200 steps: {counts}; none wrong")
