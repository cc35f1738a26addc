"""Eight simulated CPU devices, and one tiny trained workdir that tests share."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/tale_jax/xla-tests"))

import dataclasses
import signal
from pathlib import Path

import hypothesis
import jax
import pytest

# Programs that tests start inherit what is ignored: Ctrl-C and SIGQUIT in a background job, hang-ups under nohup.
usual = {signal.SIGINT: signal.default_int_handler, signal.SIGQUIT: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
for number, handler in usual.items():
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

hypothesis.settings.register_profile("tale_jax", deadline=None)  # no test asserts a time
hypothesis.settings.load_profile("tale_jax")

from helpers import build_config  # noqa: E402
from remedies.reached import (  # noqa: E402, F401  (hooks)
    pytest_configure,
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_runtest_setup,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

from tale_jax.hardware.backend import Backend, start_backend  # noqa: E402

# JAX is set here as a run sets it: a test module that makes an array when it is imported would start it otherwise.
CPU = dataclasses.replace(start_backend("cpu"), devices=(jax.devices()[0],))


@pytest.fixture(scope="session")
def cpu() -> Backend:
    """One CPU device, whatever the tests simulate."""
    return CPU


@pytest.fixture(scope="session")
def trained(tmp_path_factory, cpu) -> Path:
    """A workdir after the whole tiny recipe. Not to be written to."""
    from tale_jax.runs.train import train

    workdir = tmp_path_factory.mktemp("trained")
    train(build_config(), workdir, cpu)
    return workdir
