"""Launch scripts as real processes, held at a moment of their own, and what a run is compared by."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers import ROOT

SCALE = float(os.environ.get("FAULTS", "0.5"))
EVERY_STEPS = 2  # between checkpoints
RECIPE = (
    "--config=configs/tales.py:tiny",
    "--config.backend.platform=cpu",
    "--config.precision=float32",
    *(f"--config.corpus.num_{split}_tales={count}" for split, count in (("train", 100), ("valid", 10), ("test", 10))),
    *(f"--config.model.{each}" for each in ("num_layers=1", "embed_dim=32", "num_heads=2", "mlp_dim=32")),
    "--config.tokenizer.vocab_size=320",
    "--config.total_steps=40",
    f"--config.checkpoint.every_steps={EVERY_STEPS}",
    "--config.evaluate.every_steps=20",
    "--config.metrics.every_steps=1",
    "--config.sample.every_steps=0",
    "--config.sample.num_samples=1",
    "--config.sample.max_tokens=8",
)
PATIENCE = 900  # seconds for anything on a busy machine; nothing here is about speed


def start(
    name: str, *flags: str, hold_at: str = "", counts: Path | None = None, before: Callable[[], None] | None = None
) -> subprocess.Popen:
    """Starts `python launch/NAME.py FLAGS`; with `hold_at` it stops itself there (see held/sitecustomize.py).

    `before` runs in the new process before the script does.
    """
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    if hold_at or counts:
        folders = [str(Path(__file__).parent / "held"), env.get("PYTHONPATH", "")]
        env |= {"PYTHONPATH": ":".join(filter(None, folders)), "HOLD_AT": hold_at, "HOLD_COUNTS": str(counts or "")}
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, preexec_fn=before)


def run(name: str, *flags: str, **more: Any) -> subprocess.CompletedProcess:
    """Runs a launch script to its end."""
    process = start(name, *flags, **more)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def is_held(process: subprocess.Popen) -> bool:
    """Waits until a process stands at its moment; False when it has ended without coming there."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        pid, status = os.waitpid(process.pid, os.WUNTRACED | os.WNOHANG)
        if pid and os.WIFSTOPPED(status):
            return True
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return False
        time.sleep(0.01)
    raise AssertionError(f"{process.args} neither ends nor comes to its moment")


@contextlib.contextmanager
def held(at: str, name: str, *flags: str, **more: Any) -> Iterator[subprocess.Popen]:
    """A launch script that stands at a moment; it is killed when it is still there at the end."""
    process = start(name, *flags, hold_at=at, **more)
    try:
        assert is_held(process), process.communicate()
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            process.communicate()


def go_on(process: subprocess.Popen, *signals: int) -> tuple[int, str, str]:
    """Sends signals to a process that is held, lets it go on, and returns its exit code, stdout and stderr."""
    for number in signals:
        process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    return process.returncode, stdout, stderr


def newest_digests(workdir: Path) -> tuple[int, dict[str, str], dict[str, Any]]:
    """The step, the digests of all arrays and the data position of the newest checkpoint: equal where every bit is."""
    newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    manifest = json.loads((newest / "manifest.json").read_text())
    return manifest["step"], manifest["arrays"], manifest["data"]


def recorded_steps(workdir: Path) -> list[int]:
    """The step of each line of metrics.jsonl, in the order in which they were written."""
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
