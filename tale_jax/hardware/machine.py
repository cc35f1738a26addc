"""What can be known about this machine without JAX: memory, processors, disk, and the plugins that are installed.

JAX is not imported here, so that the reason can still be told where it does not start.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import platform
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tale_jax.utils.files import write_atomically
from tale_jax.utils.paths import printable_path
from tale_jax.utils.subprocesses import run, run_code


class MetalPlugin(NamedTuple):
    """A plugin that gives JAX an Apple GPU: the platform it registers, and the first macOS and Python it supports."""

    platform: str
    min_macos: tuple[int, int]
    min_python: tuple[int, int]


METAL_PLUGINS = {  # by the name of the distribution
    "jax-mps": MetalPlugin("mps", (14, 0), (3, 12)),
    "jax-metal": MetalPlugin("METAL", (14, 4), (3, 11)),
    "metaljax": MetalPlugin("metal", (27, 0), (3, 12)),
    "jax-graft": MetalPlugin("mtl", (26, 0), (3, 12)),
}
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def cache_folder() -> Path | None:
    """Where tale_jax keeps what holds for this machine only: compiled programs, and results of checks.

    None where nothing can be written: the cache is optional.
    """
    return _cache_in(os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME", ""))[0]


def cache_fault() -> str:
    """Why there is no cache folder, in words; "" where there is one."""
    return _cache_in(os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME", ""))[1]


@functools.cache
def _cache_in(xdg_cache_home: str, home: str) -> tuple[Path | None, str]:
    """The cache folder, tried by writing a file there, and why there is none."""
    del home  # a part of the key: Path.home() reads it
    try:
        folder = (Path(xdg_cache_home) if xdg_cache_home else Path.home() / ".cache") / "tale_jax"
    except RuntimeError:
        return None, "HOME is not set, and this user has no home"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except (OSError, ValueError) as error:
        return None, f"{printable_path(folder)} cannot be written to ({getattr(error, 'strerror', '') or error})"
    return folder, ""


def cache_file(*parts: str) -> Path | None:
    """A path in the cache folder, None where there is none."""
    folder = cache_folder()
    return folder.joinpath(*parts) if folder else None


def keep(file: Path | None, content: str = "") -> None:
    """Writes a file of the cache, where that is possible."""
    if file:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, content)


def version(distribution: str) -> str:
    """The installed version, "" if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def is_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def macos_version() -> tuple[int, int]:
    """Major and minor version of macOS, (0, 0) elsewhere."""
    parts = platform.mac_ver()[0].split(".")
    return (int(parts[0]), int((parts[1:] or ["0"])[0])) if parts[0] else (0, 0)


def metal_plugin() -> str:
    """The installed Apple GPU plugin, "" if there is none. Raises ValueError when two are installed: they clash."""
    installed = [name for name in METAL_PLUGINS if version(name)]
    if len(installed) > 1:
        raise ValueError(
            f"backend.platform=metal must find one plugin, but {' and '.join(installed)} are installed and clash; "
            f"pip uninstall {' '.join(installed[1:])}"
        )
    return installed[0] if installed else ""


def no_plugin_reason() -> str:
    """Why no plugin is installed, and what would change that. An extra whose marker is false installs nothing."""
    python = ".".join(map(str, sys.version_info[:2]))
    if not is_apple_silicon():
        return f"Apple GPUs need a Mac with Apple silicon, and this is {sys.platform} on {platform.machine()}"
    if macos_version() < METAL_PLUGINS["jax-mps"].min_macos:
        return f"jax-mps needs macOS 14 and this is {platform.mac_ver()[0]}; update macOS, or train on the CPU"
    if sys.version_info[:2] < METAL_PLUGINS["jax-mps"].min_python:
        return (
            f"the extra [metal] installs nothing on Python {python}, since jax-mps needs 3.12; "
            "make the environment again: make env EXTRAS=dev,metal PYTHON=python3.13"
        )
    return "no plugin is installed; make env EXTRAS=dev,metal"


def unmet_requirement(plugin: str) -> str:
    """What `plugin` needs and this machine lacks, "" if nothing is known to be missing."""
    _, macos, python = METAL_PLUGINS[plugin]
    if is_apple_silicon() and macos_version() < macos:
        return f"{plugin} needs macOS {macos[0]}.{macos[1]}, and this is {platform.mac_ver()[0]}"
    if sys.version_info[:2] < python:
        return f"{plugin} needs Python {python[0]}.{python[1]}"
    jax = version("jax")
    if plugin == "jax-metal" and not jax.startswith("0.4.") and jax != "0.5.0":
        return f"jax-metal 0.1.1 needs jax 0.4.34 to 0.5.0, and this is {jax}; make env EXTRAS=dev,jax-metal"
    return ""


def start_failure(plugin: str) -> str:
    """Why JAX does not start with `plugin`, "" if it does: tried in another process, since some plugins abort it.

    A success is cached for these versions.
    """
    versions = "-".join((plugin, version(plugin), version("jax"), *map(str, sys.version_info[:2])))
    success = cache_file("plugins", versions)
    if success and success.exists():
        return ""
    env = {"JAX_PLATFORMS": METAL_PLUGINS[plugin].platform}
    code = "import jax; print(float(jax.numpy.ones(3).sum()))"
    result = run_code(code, env=env, timeout=120)
    if not result.reason and result.stdout.strip().endswith("3.0"):
        keep(success)
        return ""
    symptom = result.reason or "it computes a wrong sum"
    missing = unmet_requirement(plugin)
    return f"{missing} ({symptom})" if missing else symptom


def starts_on_cpu() -> bool:
    """Whether JAX starts on the CPU here: a plugin that aborts ends the process on every platform."""
    return not run_code("import jax; jax.devices()", env={"JAX_PLATFORMS": "cpu"}).reason


def cpu_name() -> str:
    """Model and number of processors."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    if not model and sys.platform == "darwin":
        model = _sysctl("machdep.cpu.brand_string")
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def has_avx512() -> bool:
    """Whether the processors compute on 512 bits at once."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and " avx512f " in info.read_text()


def has_cuda_plugin() -> bool:
    """Whether JAX's plugin for NVIDIA GPUs is installed."""
    return any(str(each.name).startswith("jax-cuda") for each in importlib.metadata.distributions())


def total_memory() -> int:
    """Bytes of memory this process may use: the machine's, or less where a container is limited; 0 if unknown."""
    if sys.platform == "darwin":
        return int(_sysctl("hw.memsize") or 0)
    limits = [_meminfo("MemTotal")]
    for file in CGROUP_LIMITS:
        text = file.read_text().strip() if file.is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(filter(None, limits), default=0)


def gpu_working_set(plugin: str) -> int:
    """Bytes of memory that the Apple GPU of this machine may fill and stay fast; 0 without a plugin for one."""
    return apple_gpu_memory(total_memory()) if plugin else 0


def apple_gpu_memory(memory: int) -> int:
    """Bytes of a Mac's memory that its GPU may fill and stay fast: two thirds (5.3 of 8 GB)."""
    return memory * 2 // 3


def resident_memory() -> int:
    """Bytes of this process that are in memory now (on macOS: the peak)."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status.read_text())[0]) * 1024
    return peak_resident_memory()


def peak_resident_memory() -> int:
    """The largest number of bytes of this process that were in memory at once."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> None:
    """Lets glibc's malloc keep freed blocks of up to 32 MB, in one heap, until `release_memory` is called.

    XLA on CPU allocates scratch for every product; where that memory goes back to the system in between, its pages are
    cleared and mapped again each time. Several heaps keep more free memory than one. Larger arrays go back to the
    system: to keep them is 3 % faster but takes up to 700 MB more (measured). Without glibc this does nothing.
    """
    if mallopt := _glibc_function("mallopt"):
        mallopt(-8, 1)  # M_ARENA_MAX
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def release_memory() -> None:
    """Gives freed memory back to the system, as after compiling or saving (glibc only)."""
    if trim := _glibc_function("malloc_trim"):
        trim(0)


def disk_speed(folder: Path, size: int = 128 << 20) -> float:
    """Bytes a second that can be written into `folder` and are then on disk."""
    file, block = folder / ".speed", os.urandom(1 << 20)
    try:
        start_time = time.perf_counter()
        with file.open("wb") as out:
            for _ in range(size >> 20):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        return size / (time.perf_counter() - start_time)
    finally:
        file.unlink(missing_ok=True)


def _glibc_function(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):  # another C library
        return None


def _meminfo(field: str) -> int:
    info = Path("/proc/meminfo")
    found = re.search(rf"{field}:\s+(\d+) kB", info.read_text()) if info.is_file() else None
    return int(found[1]) * 1024 if found else 0


def _sysctl(name: str) -> str:
    return run(["sysctl", "-n", name]).stdout.strip()
