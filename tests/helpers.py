"""What tests share: the tiny config, launch scripts as a user starts them, and where the repository lies."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from configs import tales
from tale_jax.config import Config

ROOT = Path(__file__).resolve().parents[1]


def build_config(**changes: Any) -> Config:
    """The tiny recipe with `changes` by dotted name: build_config(**{"model.num_layers": 1})."""
    config = tales.get_config("tiny")
    config.update_from_flattened_dict(changes)
    return Config.build(config)


def start_script(name: str, *flags: str, cwd: Path = ROOT) -> subprocess.Popen:
    """Starts `python launch/NAME.py FLAGS` as a user does: one device, no test settings."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *flags]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_script(name: str, *flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs a launch script to its end."""
    process = start_script(name, *flags, cwd=cwd)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
