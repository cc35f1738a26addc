"""What can be known about this machine without JAX: memory, processors, disk, and the plugins that are installed.

JAX is not imported here, so that what keeps it from starting can still be told.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import sys
import time
from pathlib import Path

from tale_jax.utils.subprocesses import run, run_code

# Plugins that give JAX an Apple GPU: distribution → the platform it registers, and the first macOS and Python it takes.
METAL_PLUGINS = {
    "jax-mps": ("mps", (14, 0), (3, 12)),
    "jax-metal": ("METAL", (14, 4), (3, 11)),
    "metaljax": ("metal", (27, 0), (3, 12)),
    "jax-graft": ("mtl", (26, 0), (3, 12)),
}
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")


def cache_folder() -> Path:
    """Where tale_jax keeps what is true of this machine: compiled programs, and what probes found."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tale_jax"


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
    found = [name for name in METAL_PLUGINS if version(name)]
    if len(found) > 1:
        raise ValueError(
            f"backend.platform=metal must find one plugin, but {' and '.join(found)} are installed and clash; "
            f"pip uninstall {' '.join(found[1:])}"
        )
    return found[0] if found else ""


def why_no_metal() -> str:
    """Why no plugin is installed, and what would change that. An extra whose marker is false installs nothing."""
    python = ".".join(map(str, sys.version_info[:2]))
    if not is_apple_silicon():
        return f"Apple GPUs need a Mac with Apple silicon, and this is {sys.platform} on {platform.machine()}"
    if macos_version() < METAL_PLUGINS["jax-mps"][1]:
        return f"jax-mps needs macOS 14 and this is {platform.mac_ver()[0]}; update macOS, or train on the CPU"
    if sys.version_info[:2] < METAL_PLUGINS["jax-mps"][2]:
        return (
            f"the extra [metal] installs nothing on Python {python}, since jax-mps needs 3.12; "
            "make the environment again: make env EXTRAS=dev,metal PYTHON=python3.13"
        )
    return "no plugin is installed; make env EXTRAS=dev,metal"


def why_plugin_fails(plugin: str) -> str:
    """What `plugin` asks for and this machine lacks, "" if nothing is known to be missing."""
    _, macos, python = METAL_PLUGINS[plugin]
    if is_apple_silicon() and macos_version() < macos:
        return f"{plugin} needs macOS {macos[0]}.{macos[1]}, and this is {platform.mac_ver()[0]}"
    if sys.version_info[:2] < python:
        return f"{plugin} needs Python {python[0]}.{python[1]}"
    jax = version("jax")
    if plugin == "jax-metal" and not jax.startswith("0.4.") and jax != "0.5.0":
        return f"jax-metal 0.1.1 needs jax 0.4.34 to 0.5.0, and this is {jax}; make env EXTRAS=dev,jax-metal"
    return ""


def trial(plugin: str) -> str:
    """Why JAX does not start with `plugin`, "" if it does: tried in another process, since some abort it.

    A success is remembered for these versions.
    """
    versions = "-".join((plugin, version(plugin), version("jax"), *map(str, sys.version_info[:2])))
    remembered = cache_folder() / "plugins" / versions
    if remembered.exists():
        return ""
    env = {"JAX_PLATFORMS": METAL_PLUGINS[plugin][0]}
    code = "import jax; print(float(jax.numpy.ones(3).sum()))"
    answer = run_code(code, env=env, timeout=120)
    if not answer.reason and answer.stdout.strip().endswith("3.0"):
        with contextlib.suppress(OSError):  # the cache is optional
            remembered.parent.mkdir(parents=True, exist_ok=True)
            remembered.touch()
        return ""
    how = answer.reason or "it computes a wrong sum"
    known = why_plugin_fails(plugin)
    return f"{known} ({how})" if known else how


def starts_on_cpu() -> bool:
    """JAX starts on the CPU here. A plugin that aborts takes JAX with it on every platform."""
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
    """The processors compute on 512 bits at once."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and " avx512f " in info.read_text()


def has_cuda_plugin() -> bool:
    """JAX's plugin for NVIDIA GPUs is installed."""
    return any(str(each.name).startswith("jax-cuda") for each in importlib.metadata.distributions())


def total_memory() -> int:
    """Bytes of memory this process may use: the machine's, or less where a container is limited; 0 if unknown."""
    if sys.platform == "darwin":
        return int(_sysctl("hw.memsize") or 0)
    found = [_meminfo("MemTotal")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(limit).read_text().strip() if Path(limit).is_file() else ""
        found += [int(text)] if text.isdigit() else []
    return min(filter(None, found), default=0)


def gpu_working_set(plugin: str) -> int:
    """Bytes of memory that the Apple GPU of this machine works well with; without one 0."""
    return gpu_share(total_memory()) if plugin else 0


def gpu_share(memory: int) -> int:
    """Bytes that an Apple GPU works well with, of a machine's memory: two thirds (5.3 of 8 GB)."""
    return memory * 2 // 3


def resident_memory() -> int:
    """Bytes of this process that are in memory now (on macOS: the most that were)."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status.read_text())[0]) * 1024
    return peak_resident_memory()


def peak_resident_memory() -> int:
    """Bytes of this process that were in memory at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed_memory() -> None:
    """Lets glibc's malloc keep what is freed, up to 32 MB a piece and in one heap, until `release_memory` is called.

    XLA on CPU asks for scratch in every product, and handed back to the system in between, its pages are cleared and
    mapped again each time. Several heaps hold more that is free. The arrays of a whole step stay with the system: kept,
    they gain 3 % more speed but take up to 700 MB more (measured). Without glibc: nothing.
    """
    if mallopt := _glibc("mallopt"):
        mallopt(-8, 1)  # M_ARENA_MAX
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def release_memory() -> None:
    """Gives freed memory back to the system, as after compiling or saving (glibc only)."""
    if trim := _glibc("malloc_trim"):
        trim(0)


def disk_speed(folder: Path, size: int = 128 << 20) -> float:
    """Bytes a second that can be written into `folder` and are then on disk."""
    file, block = folder / ".speed", os.urandom(1 << 20)
    try:
        begin = time.perf_counter()
        with file.open("wb") as out:
            for _ in range(size >> 20):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        return size / (time.perf_counter() - begin)
    finally:
        file.unlink(missing_ok=True)


def _glibc(name: str):
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
