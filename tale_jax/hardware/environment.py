"""Variables of the environment that keep JAX from starting, or would change what is learned: found and named.

XLA ends the process at a flag that it does not know, so its flags are tried in another one. JAX is imported where it is
needed only, since an odd value of a variable of its own is an error of that import.
"""

import hashlib
import os
from collections.abc import Iterator

from tale_jax.hardware import machine
from tale_jax.utils.paths import printable_path
from tale_jax.utils.settings import format_value
from tale_jax.utils.subprocesses import ProcessResult, run_code

START_XLA = "import jax; jax.devices()"
PLATFORM_VARIABLES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
# JAX's settings that a run depends on, their values, and what another value would do.
JAX_SETTINGS = {
    "jax_enable_x64": (False, "it would change what is learned"),
    "jax_disable_jit": (False, "a training step is one compiled program"),
    "jax_default_prng_impl": ("threefry2x32", "it would change what is learned"),
    "jax_numpy_dtype_promotion": ("standard", "the model is written for the standard one"),
    "jax_numpy_rank_promotion": ("allow", "the model is written for the standard one"),
    "jax_default_device": (None, "backend.platform chooses the devices"),
}
TIMEOUT = 120  # seconds


def xla_flags_fault() -> str:
    """Why XLA does not start with the XLA_FLAGS of the user, in one line; "" where it does.

    A success is kept for these flags and versions.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if not flags.strip():
        return ""
    known = hashlib.sha256("\n".join([flags, machine.version("jax"), machine.version("jaxlib")]).encode()).hexdigest()
    success = machine.cache_file("xla_flags", known[:24])
    if success and success.exists():
        return ""
    env = {"JAX_PLATFORMS": "cpu", "JAX_PLATFORM_NAME": ""}
    result = run_code(START_XLA, env=env, timeout=TIMEOUT)
    if not result.reason:
        machine.keep(success)
        return ""
    if run_code(
        START_XLA, env={"JAX_PLATFORMS": "cpu", "JAX_PLATFORM_NAME": "", "XLA_FLAGS": ""}, timeout=TIMEOUT
    ).reason:
        return ""  # something else is wrong, which the start of JAX will tell
    return f"XLA_FLAGS={format_value(flags)} keeps XLA from starting ({_said(result, flags)}); correct it or unset it"


def _said(result: ProcessResult, flags: str) -> str:
    """What XLA printed about its flags before it ended, without time and place; the last line where it said nothing."""
    names = ["XLA_FLAGS", *(flag.partition("=")[0].lstrip("-") for flag in flags.split())]
    lines = [line for line in result.stderr.splitlines() if any(name and name in line for name in names)]
    return " ".join((lines or [result.reason])[0].rpartition("] ")[2].split())


def platform_variables() -> str:
    """The first variable of the user that chooses JAX's platform, as NAME=value; "" where none does."""
    return next(
        (f"{name}={printable_path(os.environ[name])}" for name in PLATFORM_VARIABLES if os.environ.get(name)), ""
    )


def settle_jax_settings() -> Iterator[str]:
    """Gives JAX's settings the values that a run depends on, and yields a line about each that the user had changed."""
    import jax

    for name, (wanted, reason) in JAX_SETTINGS.items():
        if (value := getattr(jax.config, name, wanted)) != wanted:
            jax.config.update(name, wanted)
            yield f"{name.upper()}={value} is not used: {reason}"


def variables_of_jax() -> str:
    """The variables of the user that JAX reads, as NAME=value, for a message; "" where there are none."""
    return " ".join(f"{name}={printable_path(os.environ[name])}" for name in sorted(os.environ) if name[:4] == "JAX_")


def changed_variables() -> dict[str, str]:
    """The variables of the user that change how Python, JAX and XLA start, by name."""
    starts = ("JAX_", "XLA_", "PYTHON", "LD_PRELOAD", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES")
    ours = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(starts) and value and ours.get(name) != value
    }
