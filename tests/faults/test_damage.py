"""Files of a workdir that are damaged: what reads them falls back to an older step, or refuses. FAULTS=5 does 200."""

import collections
import itertools
import json
import random
import shutil

import pytest
from faults.processes import RECIPE, SCALE, newest_digests, run

from tale_jax.runs.verify import RECORDS, verify

pytestmark = pytest.mark.faults

DAMAGES = ("flip", "truncate", "delete", "swap", "append")
SCRIPTS = {
    "evaluate": ("--num_samples=0", "--json"),
    "sample": ("--prompt=Once", "--max_tokens=8", "--temperature=0", "--json"),
    "train": (*RECIPE, "--config.total_steps=42"),
}


def files_by_kind(workdir):
    """The files of a workdir: arrays and other parts of checkpoints, manifests, config, tokenizer, windows, records."""
    found = {"config": [workdir / "config.json"], "records": [workdir / name for name in RECORDS[:2]]}
    found["tokenizer"] = sorted((workdir / "tokenizer").iterdir())
    found["windows"] = sorted((workdir / "windows").iterdir())
    parts = [path for path in sorted((workdir / "checkpoints").rglob("*")) if path.is_file() and path.stat().st_size]
    found["arrays"] = [path for path in parts if path.parent.name == "d"]
    found["manifest"] = [path for path in parts if path.name == "manifest.json"]
    found["of orbax"] = [path for path in parts if path not in (*found["arrays"], *found["manifest"])]
    return found


def damage(workdir, file, kind, rng):
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        content = content[: rng.randrange(len(content))]
    elif kind == "append":
        content += b"\0"
    elif kind == "swap":  # with that of another step, or another file
        others = [path for path in workdir.rglob(file.name) if path.is_file() and path.read_bytes() != content]
        others = others or [path for path in workdir.rglob("*") if path.is_file() and path.read_bytes() != content]
        content[:] = rng.choice(sorted(others)).read_bytes()
    file.unlink()
    if kind != "delete":
        file.write_bytes(content)


def measured(stdout):
    """What a script found, without the time it took."""
    result = json.loads(stdout.splitlines()[-1])
    return json.dumps(result.get("nats_per_token") or [sample["text"] for sample in result["samples"]])


def test_no_damage_is_believed(whole, tmp_path, tell):
    rng, counts, kinds = random.Random(1), collections.Counter(), collections.Counter()
    right = {}
    for name in ("evaluate", "sample"):
        for step in sorted(path.name for path in (whole / "checkpoints").glob("[0-9]*")):
            done = run(name, f"--workdir={whole}", f"--step={step}", *SCRIPTS[name])
            right.setdefault(name, set()).add(measured(done.stdout))
    cases = itertools.product(DAMAGES, SCRIPTS)  # every damage by every script, before one comes again
    for (how, name), _ in zip(itertools.cycle(cases), range(round(40 * SCALE)), strict=False):
        workdir = tmp_path / "run"
        shutil.copytree(whole, workdir)
        files = files_by_kind(workdir)
        kind = rng.choice(sorted(files))
        file = rng.choice(files[kind])
        damage(workdir, file, how, rng)
        what = f"{name} of {file.relative_to(workdir)}, {how}"
        assert verify(workdir).bad or kind == "records", f"{what}: not found by verify"
        done = run(name, f"--workdir={workdir}", *SCRIPTS[name])
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, f"{what}: {done.stderr}"
        if done.returncode == 2:
            assert kind != "records" and len(done.stderr.splitlines()) <= 3, f"{what}: {done.stderr}"
            counts["refused"] += 1
        elif name == "train":
            counts["went on from what is whole, or made anew"] += 1
            # An older step that is damaged stays as it is, and is told; nothing reads it.
            left = (*RECORDS, *(f"checkpoints/{part}" for part in file.relative_to(workdir).parts[1:2]))
            assert not [line for line in verify(workdir).bad if not line.startswith(left)], what
            assert newest_digests(workdir)[0] == 42, what
        else:
            counts["fell back" if "is not used" in done.stderr else "not needed for the result"] += 1
            assert measured(done.stdout) in right[name], f"silently wrong: {what}"
        kinds[kind] += 1
        shutil.rmtree(workdir)
    tell(f"{kinds.total()} damages of {dict(kinds)}: {dict(counts)}, silently wrong: 0")
