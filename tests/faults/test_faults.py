"""Real processes, real signals, real damage: nothing saved is lost, and nothing damaged is believed.

`make test-faults` runs a part; FAULTS=5 does 50 kills and 200 corruptions.
"""

import collections
import itertools
import json
import os
import random
import shutil
import signal
import time

import pytest
from helpers import run_script, start_script

pytestmark = pytest.mark.faults

SCALE = float(os.environ.get("FAULTS", "0.5"))
RECIPE = (
    "--config=configs/tales.py:tiny",
    "--config.backend.platform=cpu",
    "--config.precision=float32",
    "--config.corpus.num_train_tales=100",
    "--config.corpus.num_valid_tales=10",
    "--config.corpus.num_test_tales=10",
    "--config.checkpoint.every_steps=2",
    "--config.evaluate.every_steps=10",
    "--config.metrics.every_steps=1",
)


def newest_digests(workdir):
    """The digests of all arrays of the newest checkpoint: equal where every bit is."""
    newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    manifest = json.loads((newest / "manifest.json").read_text())
    return manifest["step"], manifest["arrays"], manifest["data"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("faults") / "whole"
    done = run_script("train", *RECIPE, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


def test_kills_at_random_moments_lose_at_most_one_interval(whole, tmp_path):
    """While preparing, stepping, saving and deleting; at the end every bit is that of a run left alone."""
    rng, counts = random.Random(0), collections.Counter()
    while counts["kills"] < 10 * SCALE:
        workdir = tmp_path / f"run{counts['runs']}"
        counts["runs"] += 1
        for _ in range(4):
            process = start_script("train", *RECIPE, f"--workdir={workdir}")
            time.sleep(rng.uniform(2, 14))
            process.kill()
            process.communicate()
            counts["kills"] += process.returncode == -signal.SIGKILL
        done = run_script("train", *RECIPE, f"--workdir={workdir}")
        assert done.returncode == 0, done.stderr
        assert newest_digests(workdir) == newest_digests(whole)
        checked = json.loads(run_script("verify", f"--workdir={workdir}", "--json").stdout.splitlines()[-1])
        assert checked["bad"] == []
        steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        lost = [before - after for before, after in itertools.pairwise(steps) if after < before]
        assert max(lost, default=0) <= 2 + 1, lost  # an interval, and the step that is told one late
        shutil.rmtree(workdir)
    print(f"\n{dict(counts)}: all went on, all equal to the bit")


DAMAGES = ("flip", "truncate", "delete", "swap", "append")


def damage(workdir, kind, rng):
    """Damages one file that is read: of the newest checkpoint, config.json, the tokenizer or the windows."""
    files = [path for part in ("checkpoints/20", "tokenizer", "windows") for path in (workdir / part).rglob("*")]
    files = [path for path in [*files, workdir / "config.json"] if path.is_file() and path.stat().st_size]
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        content = content[: rng.randrange(len(content))]
    elif kind == "append":
        content += b"\0"
    elif kind == "swap":
        content[:] = rng.choice([path for path in files if path.read_bytes() != content]).read_bytes()
    file.unlink()
    if kind != "delete":
        file.write_bytes(content)
    return file.relative_to(workdir)


def test_no_damage_is_believed(whole, tmp_path):
    rng, counts = random.Random(1), collections.Counter()
    flags = {"train": (*RECIPE, "--config.total_steps=22"), "evaluate": ("--num_samples=0", "--json")}
    flags["sample"] = ("--prompt=Once", "--max_tokens=8", "--temperature=0", "--json")
    right = {}
    for name in ("evaluate", "sample"):
        for step in sorted(path.name for path in (whole / "checkpoints").glob("[0-9]*")):
            done = run_script(name, f"--workdir={whole}", f"--step={step}", *flags[name])
            right.setdefault(name, set()).add(measured(done.stdout))
    for number in range(round(40 * SCALE)):
        workdir, name = tmp_path / "run", ("evaluate", "sample", "train")[number % 3]
        shutil.copytree(whole, workdir)
        file = damage(workdir, DAMAGES[number % len(DAMAGES)], rng)
        bad = run_script("verify", f"--workdir={workdir}")
        assert bad.returncode == 1, f"{file}: {bad.stdout}"
        done = run_script(name, f"--workdir={workdir}", *flags[name])
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, f"{name}, {file}: {done.stderr}"
        if done.returncode == 2:
            counts["refused"] += 1
        elif name == "train":
            counts["fell back, or was made anew"] += 1
            assert run_script("verify", f"--workdir={workdir}").returncode == 0, file
        else:
            told = "is not used" in done.stderr
            counts["fell back" if told else "without effect"] += 1
            assert measured(done.stdout) in right[name], f"silently wrong: {name}, {file}"
        shutil.rmtree(workdir)
    print(f"\n{dict(counts)}, silently wrong: 0")


def measured(stdout):
    """What a script found, without the time it took."""
    result = json.loads(stdout.splitlines()[-1])
    return json.dumps(result.get("nats_per_token") or [sample["text"] for sample in result["samples"]])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_the_run_goes_on(whole, tmp_path, name):
    number = getattr(signal, name)
    process = start_script("train", *RECIPE, "--config.total_steps=4000", f"--workdir={tmp_path / 'run'}")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert newest_digests(tmp_path / "run")[0] >= last
