"""A workdir from elsewhere is data: whatever it holds, reading it runs no code, ends, and needs little memory.

`make test-faults` reads some; FAULTS=5 reads 1,000. A workdir with a fault stays where it is named.
"""

import collections
import contextlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import hostile
from helpers import ROOT, run_script

pytestmark = pytest.mark.faults

SCALE = float(os.environ.get("FAULTS", "0.5"))
PATIENCE = 60  # seconds of computing, or of waiting for nothing, for one workdir and all its readers
STARVED = 1800  # seconds that a busy machine may let it wait for a processor


class Reader:
    """The process that reads workdirs; a new one where the last one has ended."""

    def __init__(self, base, secret):
        self._command = [sys.executable, hostile.__file__, str(base), str(secret)]
        self._env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
        self._env.pop("XLA_FLAGS", None)
        self.start()

    def start(self):
        self._process = subprocess.Popen(
            self._command, env=self._env, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )
        assert self._answer(300)["ready"]

    def _answer(self, seconds):
        first = last = self._cpu_seconds()
        waits_since = started = time.monotonic()
        while not select.select([self._process.stdout], [], [], 1)[0]:
            now, cpu_seconds = time.monotonic(), self._cpu_seconds()
            if cpu_seconds != last or self._is_runnable():
                last, waits_since = cpu_seconds, now
            if last - first > seconds or now - waits_since > seconds or now - started > STARVED:
                return {"fault": f"hangs: {last - first:.0f} s of CPU time in {now - started:.0f} s"}
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"fault": f"ended by {-(self._process.wait() or 0)}"}

    def _cpu_seconds(self):
        """0 where the system does not tell: then it counts as waiting."""
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
            return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def _is_runnable(self):
        """Whether a thread of it would compute if the machine had a processor for it."""
        states = Path(f"/proc/{self._process.pid}/task").glob("*/stat")
        with contextlib.suppress(OSError):
            return any(path.read_text().rpartition(")")[2].split()[0] == "R" for path in states)
        return False

    def read(self, workdir):
        self._process.stdin.write(f"{workdir}\n")
        answer = self._answer(PATIENCE)
        if "fault" in answer:
            self.stop()
            self.start()
        return answer

    def stop(self):
        self._process.kill()
        self._process.communicate()


def test_workdirs_from_elsewhere_are_read_or_refused(tmp_path, tell):
    base, secret, canary = tmp_path / "base", tmp_path / "secret", tmp_path / "canary"
    tiny = ("num_layers=1", "embed_dim=16", "num_heads=2", "mlp_dim=16", "seq_len=32")
    done = run_script(
        "train",
        "--config=configs/tales.py:tiny",
        *(f"--config.model.{setting}" for setting in tiny),
        *(f"--config.corpus.num_{split}_tales={count}" for split, count in (("train", 60), ("valid", 2), ("test", 2))),
        *("--config.tokenizer.vocab_size=320", "--config.total_steps=2"),
        *("--config.backend.platform=cpu", "--config.precision=float32", "--config.checkpoint.every_steps=1"),
        f"--workdir={base}",
    )
    assert done.returncode == 0, done.stderr
    run_script("evaluate", f"--workdir={base}", "--num_samples=0")
    done = run_script("convert", f"--workdir={base}", "--to=huggingface", f"--out={base / hostile.HUGGINGFACE}")
    assert done.returncode == 0, done.stderr
    (secret / "folder").mkdir(parents=True)
    (secret / "file").write_text("{}\n")
    counts, faults, slowest = collections.Counter(), [], 0.0
    reader = Reader(base, secret)
    for seed in range(round(200 * SCALE)):
        workdir = tmp_path / f"w{seed}"
        shutil.copytree(base, workdir)
        what = hostile.mutate(workdir, random.Random(seed), secret, canary)
        answer = reader.read(workdir)
        for name, (outcome, seconds) in answer.get("said", {}).items():
            counts[outcome.partition(":")[0]] += 1
            slowest = max(slowest, seconds)
            if outcome.startswith("failed"):
                faults.append(f"{workdir} ({what}): {name} {outcome}")
        faults += [f"{workdir} ({what}): {fault}" for fault in [*answer.get("seen", []), answer.get("fault")] if fault]
        if canary.exists():
            faults.append(f"{workdir} ({what}): code was run")
            canary.unlink()
        assert (secret / "file").read_text() == "{}\n", f"{workdir} ({what}): a file elsewhere was written"
        assert sorted(os.listdir(secret / "folder")) == [], f"{workdir} ({what}): a folder elsewhere was written"
        if not any(line.startswith(f"{workdir} ") for line in faults):
            shutil.rmtree(workdir, ignore_errors=True)
    reader.stop()
    tell(f"{round(200 * SCALE)} hostile workdirs: readers {dict(counts)}; the slowest took {slowest} s of CPU time")
    assert not faults, "\n".join([f"{len(faults)} faults:", *faults])
