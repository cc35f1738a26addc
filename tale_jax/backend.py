"""The only place that names cpu, metal and cuda: picks the platform, and says what it is good at.

JAX settles its platform once in a process, so `start` must come before the first array. Choices that depend on the
platform (layout of products, donation, the precision that is fastest) are fields of the result, and travel from here as
plain arguments: no other module asks where it runs.
"""

import dataclasses
import importlib.metadata
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# Plugins that give JAX an Apple GPU: distribution → name of the platform it registers.
METAL_PLUGINS = {"jax-mps": "mps", "jax-metal": "METAL", "metaljax": "metal", "jax-graft": "mtl"}
# Random bits without 64-bit counters, which no Metal plugin is known to take. Draws of a seed are others than on a CPU.
METAL_CONFIG = {"jax_threefry_partitionable": False}
NO_BFLOAT16 = ("jax-metal",)  # every report of it aborts or errors


@dataclasses.dataclass(frozen=True)
class Backend:
    """Where this process computes.

    Attributes:
      platform: cpu, metal or cuda.
      plugin: distribution that provides an Apple GPU, or "".
      device: the device's own name.
      devices: all of them.
      natural: products with materialised transposes pay off (XLA on CPU from jaxlib 0.11, see `model/ops.py`).
      donate: buffers given to a step are reused for its results; elsewhere asking for it warns at every compilation.
      note: why `auto` chose this platform, "" when it was asked for.
    """

    platform: str
    plugin: str
    device: str
    devices: tuple[Any, ...]
    natural: bool
    donate: bool
    note: str


def metal_plugin() -> str:
    """The installed Apple GPU plugin, "" if there is none. Raises ValueError when two are installed: they clash."""
    found = [name for name in METAL_PLUGINS if _installed(name)]
    if len(found) > 1:
        raise ValueError(
            f"backend.platform=metal must find one plugin, but {' and '.join(found)} are installed and clash; "
            f"pip uninstall {' '.join(found[1:])}"
        )
    return found[0] if found else ""


def start(platform: str) -> Backend:
    """Settles JAX on a platform: auto, cpu, metal or cuda. Call it before anything else uses JAX.

    `auto` takes an Apple or NVIDIA GPU whose plugin is installed and starts, and says so when it falls back to the CPU.
    Raises ValueError when a platform asked for by name is not possible here.
    """
    _quiet_libraries()
    _cache_compilations()
    plugin = metal_plugin() if platform in ("auto", "metal") else ""
    if platform == "metal" and not plugin:
        raise ValueError(
            "backend.platform=metal needs an Apple GPU plugin, and none is installed; "
            "on an Apple silicon Mac: pip install -e '.[metal]' (the extra installs nothing elsewhere)"
        )
    note = ""
    if not os.environ.get("JAX_PLATFORMS"):
        names = {"cpu": "cpu", "cuda": "cuda", "metal": METAL_PLUGINS.get(plugin), "auto": METAL_PLUGINS.get(plugin)}
        jax.config.update("jax_platforms", names[platform])
    try:
        devices = jax.devices()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if platform != "auto":
            raise ValueError(f"backend.platform={platform} does not start here ({reason}); try auto or cpu") from None
        note = f"falls back to the CPU: {plugin or 'the GPU'} does not start ({reason})"
        jax.config.update("jax_platforms", "cpu")
        devices = jax.devices()
    first = devices[0]
    name = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}.get(first.platform, "metal")
    if platform not in ("auto", name):
        raise ValueError(
            f"backend.platform={platform} is not what JAX starts here ({first.platform}); unset JAX_PLATFORMS"
        )
    if name == "metal":
        for option, value in METAL_CONFIG.items():
            jax.config.update(option, value)
    here = Backend(
        platform=name,
        plugin=plugin if name == "metal" else "",
        device=_cpu_name() if name == "cpu" else first.device_kind,
        devices=tuple(devices),
        natural=False,
        donate=False,
        note=note,
    )
    return on_platform(here, name)


def on_platform(backend: Backend, platform: str) -> Backend:
    """The choices that `platform` asks for, on whatever devices: what a program for it looks like can be seen anywhere.

    Donation is honoured by XLA on CPU and CUDA, and by no Metal plugin that we know of.
    """
    version = _version(jax.__version__)
    natural = platform == "cpu" and version >= (0, 11)
    # Old jaxlib on CPU gives arrays that were restored from a checkpoint back to the wrong allocator, and aborts.
    donate = platform == "cuda" or (platform == "cpu" and version >= (0, 5))
    return dataclasses.replace(backend, platform=platform, natural=natural, donate=donate)


@contextmanager
def tracing_for_metal() -> Iterator[None]:
    """Inside it JAX traces as `start` sets it on a Metal platform."""
    before = {option: getattr(jax.config, option) for option in METAL_CONFIG}
    try:
        for option, value in METAL_CONFIG.items():
            jax.config.update(option, value)
        yield
    finally:
        for option, value in before.items():
            jax.config.update(option, value)


def choose_precision(backend: Backend, precision: str) -> tuple[Any, str]:
    """The dtype to compute in, and why. `precision` is auto, float32 or bfloat16; float32 wins ties.

    Raises ValueError for a dtype that the backend is known not to compute.
    """
    if precision == "bfloat16" and backend.plugin in NO_BFLOAT16:
        raise ValueError(f"precision=bfloat16 is not computed by {backend.plugin}; try precision=float32")
    if precision != "auto":
        return jnp.dtype(precision), "as the config says"
    if backend.plugin in NO_BFLOAT16:
        return jnp.dtype("float32"), f"{backend.plugin} does not compute bfloat16"
    rates = {name: _matmul_rate(name) for name in ("float32", "bfloat16")}
    shown = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
    faster = rates["bfloat16"] > 1.3 * rates["float32"]
    return jnp.dtype("bfloat16" if faster else "float32"), f"matrix products here: {shown}"


def matmul_peak(dtype: Any) -> float:
    """FLOP/s of large matrix products in `dtype` on the first device, measured now: what a step is compared with."""
    return max(_matmul_rate(jnp.dtype(dtype).name, size=1024) for _ in range(2))


def _matmul_rate(dtype: str, size: int = 512, seconds: float = 0.1) -> float:
    x = jnp.ones((size * 2, size), dtype)
    w = jnp.ones((size, size * 2), dtype)
    product = jax.jit(jnp.matmul)
    float(product(x, w)[0, 0])  # a host read: block_until_ready is a no-op on some plugins
    best, count, end = 0.0, 4, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        products = [product(x, w) for _ in range(count)]
        float(products[-1][0, 0])
        best = max(best, count * 8 * size**3 / (time.perf_counter() - begin))
    return best


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    if not model:
        import platform

        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def _cache_compilations() -> None:
    """A second start finds its programs compiled, in the user's cache folder (or JAX_COMPILATION_CACHE_DIR)."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "tale_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _quiet_libraries() -> None:
    """Warnings that a user can do nothing about do not tear the progress bar."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=UserWarning, module="jax|orbax|flax|grain")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="jax|orbax|flax|grain")
    for name in ("absl", "orbax", "jax._src.xla_bridge", "jax._src.compilation_cache"):
        logging.getLogger(name).setLevel(logging.ERROR)
