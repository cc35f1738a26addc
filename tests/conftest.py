"""What tests share: eight simulated CPU devices, the tiny config, and one tiny trained workdir."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/tale_jax/xla-tests"))

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("tale_jax", deadline=None)  # no test asserts a time
hypothesis.settings.load_profile("tale_jax")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # configs/ is a folder of scripts, not an installed package

from configs import tales  # noqa: E402
from tale_jax import backend  # noqa: E402
from tale_jax.config import Config  # noqa: E402


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


@pytest.fixture(scope="session", autouse=True)
def cpu() -> backend.Backend:
    """One CPU device, whatever the tests simulate; and JAX set for every test as a run sets it."""
    here = backend.start("cpu")
    return dataclasses.replace(here, devices=(jax.devices()[0],))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, cpu) -> Path:
    """A workdir after the whole tiny recipe. Not to be written to."""
    from tale_jax.training.loop import train

    workdir = tmp_path_factory.mktemp("trained")
    train(build_config(), workdir, cpu)
    return workdir
