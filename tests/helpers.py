"""What tests share: the tiny config and trainer, trees compared, launch scripts as a user starts them."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import tales
from tale_jax.config import Config
from tale_jax.hardware.backend import start_backend
from tale_jax.training.state import TrainState
from tale_jax.training.step import Trainer, make_trainer

ROOT = Path(__file__).resolve().parents[1]

# Of `tiny_trainer` and `tiny_batches`.
VOCAB_SIZE, BOS, SEQ_LEN = 64, 1, 16
# Adam divides by |gradient| + eps: with an eps this large updates are proportional to gradients, so that a gradient of
# the wrong size shows in the weights. Clipping would hide it again.
LIKE_SGD = {
    "optimizer.name": "adamw",
    "optimizer.eps": 10.0,
    "optimizer.learning_rate": 3.0,
    "optimizer.embedding_lr_multiplier": 1.0,
    "optimizer.clip_norm": 0.0,
    "optimizer.weight_decay": 0.0,
}

# The flags of a script that tests write, as the scripts in launch/ define theirs.
FLAG_DEFINITIONS = """
from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "the recipe")
WORKDIR = flags.DEFINE_string("workdir", None, "the experiment's folder", required=True)
TOP_P = flags.DEFINE_float("top_p", 1.0, "nucleus", lower_bound=0.0, upper_bound=1.0)
SPLIT = flags.DEFINE_enum("split", "valid", ["train", "valid", "test"], "which text")
COUNT = flags.DEFINE_integer("count", 3, "how many")
JSON = flags.DEFINE_bool("json", False, "one JSON object")
"""
# The least run on one's own files: `corpus.path` is missing.
TINY_FILES = {
    "corpus.name": "files",
    "corpus.held_out": 0.15,
    "windows": "stream",
    "model.mask_documents": False,
    "model.num_layers": 1,
    "model.seq_len": 32,
    "evaluate.max_windows": 4,
    "precision": "float32",
}


def build_config(**changes: Any) -> Config:
    """The tiny recipe with `changes` by dotted name: build_config(**{"model.num_layers": 1})."""
    config = tales.get_config("tiny")
    config.update_from_flattened_dict(changes)
    return Config.build(config)


def tiny_trainer(
    devices: int = 1,
    data: int = 0,
    fsdp: int = 1,
    tensor: int = 1,
    dtype: Any = jnp.float32,
    donate: bool = False,
    **changes: Any,
) -> Trainer:
    """A trainer of 100 steps of a model with 64 token ids, on so many of the simulated devices."""
    small = {
        "optimizer.learning_rate": 1e-4,
        "optimizer.eps": 1e-4,  # where gradients vanish Adam divides by rounding noise, which no order of sums repeats
        "model.num_layers": 2,
        "model.embed_dim": 32,
        "model.num_heads": 4,
        "model.seq_len": SEQ_LEN,
        "batch_size": 8,
        "total_steps": 20,
        "tokenizer.vocab_size": VOCAB_SIZE,
        "tokenizer.path": "none.model",  # with a tokenizer of its own a model may have so few ids
        "mesh.data": data,
        "mesh.fsdp": fsdp,
        "mesh.tensor": tensor,
    }
    config = build_config(**(small | changes)).with_total_steps()
    backend = dataclasses.replace(
        start_backend("cpu"), devices=tuple(jax.devices()[:devices]), materialize_transposes=True, donate=donate
    )
    return make_trainer(config, backend, dtype, BOS)


def tiny_batches(count: int, size: int = 8) -> list[np.ndarray]:
    """Batches of random windows [size, SEQ_LEN + 1]; the next batch does not depend on how many are asked for."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB_SIZE, (size, SEQ_LEN + 1), dtype=np.int32) for _ in range(count)]


def take_steps(trainer: Trainer, steps: int) -> tuple[TrainState, dict[str, np.ndarray]]:
    """The state after so many steps from the first one, and each metric of all steps."""
    state, rows = trainer.init(), []
    for windows in tiny_batches(steps):
        state, metrics = trainer.step(state, trainer.place(windows))
        rows.append(jax.device_get(metrics))
    return state, {name: np.array([row[name] for row in rows]) for name in rows[0]}


def losses(trainer: Trainer, steps: int = 20) -> np.ndarray:
    """The loss of each of so many steps from the first one."""
    return take_steps(trainer, steps)[1]["loss"]


def is_alive(pid: int) -> bool:
    """Whether a process runs, and not only waits for someone to take note of its end; by what Linux and macOS have."""
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(listed) and not listed.startswith("Z")


def assert_trees_equal(found: Any, wanted: Any) -> None:
    """Every array equal, to the bit."""
    jax.tree_util.tree_map(np.testing.assert_array_equal, found, wanted)


def assert_trees_close(found: Any, wanted: Any, **tolerance: float) -> None:
    """Every array equal, within `rtol` and `atol`."""
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, wanted)


def local_tasks(folder: Path, texts: Sequence[str], choices: Sequence[dict[str, str]]) -> Path:
    """A folder of the two lm-eval tasks of tests/evaluation/tasks, with their data."""
    shutil.copytree(ROOT / "tests" / "evaluation" / "tasks", folder)
    for task in folder.glob("*.yaml"):
        task.write_text(task.read_text().replace("__FOLDER__", str(folder)))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "choices.jsonl").write_text("".join(json.dumps(choice) + "\n" for choice in choices))
    return folder


def free_address() -> str:
    """HOST:PORT of this machine, where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_script(name: str, *flags: str, cwd: Path = ROOT, devices: int = 1) -> subprocess.Popen:
    """Starts `python launch/NAME.py FLAGS` as a user does: one device (or so many), no test settings."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} if devices > 1 else {}
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *flags]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_script(name: str, *flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs a launch script to its end."""
    process = start_script(name, *flags, cwd=cwd)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


class Terminal:
    """A launch script at a terminal of its own, as a user sits at it: what is typed goes in, what is shown is read."""

    def __init__(self, name: str, *flags: str, cwd: Path = ROOT, columns: int = 60, stdout: Any = None):
        self.shown, (self._handle, inner) = "", pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "COLUMNS")} | {"TERM": "xterm"}
        # Ctrl-C reaches the process only where the terminal is the one that controls it.
        take = "import fcntl, os, sys, termios as t; fcntl.ioctl(0, t.TIOCSCTTY, 0)"
        start = f"{take}; os.execv(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, *command],
            cwd=cwd, env=env, stdin=inner, stdout=stdout or inner, stderr=inner, start_new_session=True,
        )  # fmt: skip
        os.close(inner)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._handle)

    def type(self, keys: str) -> None:
        os.write(self._handle, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 120.0) -> str:
        """What is shown up to the end of the pattern since the last call; the rest stays for the next one."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"{pattern!r} is not shown in {self.shown!r}"
            if not self._read():
                raise AssertionError(f"{pattern!r} is not shown in {self.shown!r}, and the script has ended")
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def wait_for_prompt(self) -> str:
        """What is shown up to a prompt that takes keys.

        readline shows the prompt a moment before it listens: what is typed between is lost, Ctrl-C and Ctrl-D too.
        """
        text = self.wait_for(r"> $")
        time.sleep(0.5)
        return text

    def wait(self, seconds: float = 120.0) -> int:
        """The exit code, when the script has ended; what it still shows is in `shown`."""
        end = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < end, f"still running, showing {self.shown!r}"
        return self.process.wait(seconds)

    def _read(self) -> bool:
        """Waits a moment for what is shown; whether more may come."""
        if not select.select([self._handle], [], [], 0.2)[0]:
            return self.process.poll() is None
        try:
            data = os.read(self._handle, 1 << 16)
        except OSError:  # the other side is closed
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


@contextlib.contextmanager
def served(*flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server process and its address; it is killed when it is still there at the end."""
    process = start_script("serve", "--port=0", *flags)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+:\d+", line)
        assert found, (line, process.stderr and process.stderr.read())
        yield process, found[0]
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
