"""The scripts that read a workdir, beside a run that has saved nothing: one line says that there is nothing yet."""

import json

import pytest
from faults.processes import RECIPE, go_on, held, newest_digests, run

pytestmark = pytest.mark.faults

READERS = {
    "evaluate": ("--num_samples=0", "--json"),
    "sample": ("--prompt=Once", "--max_tokens=8", "--temperature=0", "--json"),
    "verify": ("--json",),
    "report": (),
}


def result_of(name, workdir):
    """What a reader found, as it says it, with `step`; None where it says in one line that there is nothing yet."""
    done = run(name, f"--workdir={workdir}", *READERS[name])
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, f"{name}: {done.returncode}, {done.stderr}"
    if done.returncode == 2:
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, f"{name}: {done.stderr}"
        return None
    assert "is not used" not in done.stderr, f"{name}: {done.stderr}"  # what is half there is not taken for damaged
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
