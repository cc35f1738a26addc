"""The only place that names cpu, metal and cuda: chooses the platform, and with it what is fast and possible there.

JAX chooses its platform once in a process, so `start_backend` must come before the first array. Choices that depend on
the platform (layout of products, donation, how random bits are counted) are fields of the result or set here; other
modules get them as plain arguments, and none asks where it runs. `planning/numerics.py` chooses the dtype.
"""

import dataclasses
import functools
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tale_jax.hardware import environment, machine
from tale_jax.hardware.cpu_times import CpuTimes
from tale_jax.utils.streams import notice

# JAX's setting for random bits that do not depend on the mesh. It needs 64-bit counters, which no Metal plugin is known
# to support, so it is off there, and the same seed gives other numbers than on a CPU.
PARTITIONABLE_RANDOM_BITS = "jax_threefry_partitionable"


@dataclasses.dataclass(frozen=True)
class Backend:
    """Where this process computes.

    Attributes:
      platform: cpu, metal or cuda.
      plugin: distribution that provides an Apple GPU, or "".
      device: the device's own name.
      devices: all of them.
      materialize_transposes: products are faster with materialised transposes (XLA on CPU from jaxlib 0.11, see
        `model/layers.py`).
      cudnn_attention: attention in half precision is computed by cuDNN.
      overlap_io: batches are read, and checkpoints written, while the device computes, since the host's cores are idle.
      donate: the buffers given to a step are reused for its results; where that is not possible, JAX would warn.
      memory: bytes that a run may fill, of the machine or of its GPU; 0 if unknown.
      note: why `auto` did not choose a GPU, "" when there is nothing to say.
    """

    platform: str
    plugin: str
    device: str
    devices: tuple[Any, ...]
    materialize_transposes: bool
    cudnn_attention: bool
    overlap_io: bool
    donate: bool
    memory: int
    note: str


def start_backend(platform: str) -> Backend:
    """Starts JAX on a platform: auto, cpu, metal or cuda. Call it before anything else uses JAX.

    `auto` takes an Apple or NVIDIA GPU whose plugin is installed and starts, else the CPU, and says so in `note`.
    Raises ValueError, in one line, when a platform asked for by name is not possible here, or a variable of the
    environment keeps JAX from starting.
    """
    _quiet_libraries()
    if fault := environment.xla_flags_fault():
        raise ValueError(fault)
    for line in environment.settle_jax_settings():
        notice(line)
    _cache_compilations()
    machine.keep_freed_memory()
    _set_xla_flags()
    plugin = machine.metal_plugin() if platform in ("auto", "metal") else ""
    if platform == "metal" and not plugin:
        raise ValueError(f"backend.platform=metal is not possible here: {machine.no_plugin_reason()}")
    note = f"runs on the CPU: {machine.no_plugin_reason()}" if machine.is_apple_silicon() and not plugin else ""
    if plugin and (reason := machine.start_failure(plugin)):
        if platform == "metal" or not machine.starts_on_cpu():
            raise ValueError(
                f"backend.platform={platform} does not start here: {plugin} fails ({reason}); "
                f"pip uninstall {plugin} to train on the CPU (launch/doctor.py tells more)"
            )
        note, plugin, platform = f"falls back to the CPU: {plugin} does not start ({reason})", "", "cpu"
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", _jax_platforms(platform, plugin))
    if plugin == "jax-mps":  # its own default is 1.5 repeats the working set
        os.environ.setdefault("JAX_MPS_CACHE_LIMIT_BYTES", str(machine.gpu_working_set(plugin) // 2))
    try:
        devices = jax.devices()
    except Exception as error:  # a plugin may raise anything
        reason = " ".join(str(error).split()) or "JAX finds no such device"
        if chosen := environment.platform_variables():
            raise ValueError(
                f"{chosen} keeps JAX from starting ({reason}); unset it, or set JAX_PLATFORMS=cpu"
            ) from None
        if platform != "auto":
            raise ValueError(f"backend.platform={platform} does not start here ({reason}); try auto or cpu") from None
        note = f"falls back to the CPU: {plugin or 'the GPU'} does not start ({reason})"
        jax.config.update("jax_platforms", "cpu")
        devices = jax.devices()
    first = jax.local_devices()[0]  # a process knows nothing of the memory of another one's
    name = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}.get(first.platform, "metal")
    if platform not in ("auto", name):
        line = f"backend.platform={platform} is not what JAX starts here ({first.platform})"
        if chosen := environment.platform_variables():
            raise ValueError(f"{line}; unset {chosen.partition('=')[0]} (it is {chosen.partition('=')[2]})")
        raise ValueError(f"{line}; try auto, which takes what there is")
    jax.config.update(PARTITIONABLE_RANDOM_BITS, name != "metal")
    backend = Backend(
        platform=name,
        plugin=plugin if name == "metal" else "",
        device=machine.cpu_name() if name == "cpu" else first.device_kind,
        devices=tuple(devices),
        materialize_transposes=False,
        cudnn_attention=name == "cuda" and _cudnn_attention_works(),
        overlap_io=False,
        donate=False,
        memory=_usable_memory(name, plugin, first),
        note=note,
    )
    return for_platform(backend, name)


def for_platform(backend: Backend, platform: str) -> Backend:
    """`backend` with the choices that suit `platform`, so that programs for it can be made on any machine.

    Donation works with XLA on CPU and CUDA, and with no Metal plugin that we know of.
    """
    version = _jax_version()
    materialize_transposes = platform == "cpu" and version >= (0, 11)
    # Old jaxlib on CPU gives arrays that were restored from a checkpoint back to the wrong allocator, and aborts.
    donate = platform == "cuda" or (platform == "cpu" and version >= (0, 5))
    return dataclasses.replace(
        backend,
        platform=platform,
        materialize_transposes=materialize_transposes,
        overlap_io=platform != "cpu",
        donate=donate,
    )


def for_mac(backend: Backend, memory: int) -> Backend:
    """What `backend` would be on a Mac with `memory` bytes, for plans that are made on another machine."""
    mac = for_platform(backend, "metal")
    device = "a Mac, from the same program compiled here"
    return dataclasses.replace(mac, device=device, memory=machine.apple_gpu_memory(memory), note="")


@contextmanager
def tracing_for_metal() -> Iterator[None]:
    """Inside it JAX traces as it does where `start_backend` chose Metal."""
    before = getattr(jax.config, PARTITIONABLE_RANDOM_BITS)
    try:
        jax.config.update(PARTITIONABLE_RANDOM_BITS, False)
        yield
    finally:
        jax.config.update(PARTITIONABLE_RANDOM_BITS, before)


def matmul_peak(dtype: Any) -> float:
    """FLOP/s of large matrix products in `dtype` on the first device, measured once in a process.

    The dtype of a run is chosen by it. What else computes at the same time makes it lower: see `peak.py` for a peak
    that speeds can be compared with.
    """
    return matmul_speed(jnp.dtype(dtype).name).flops


def memory_bandwidth(size: int = 64 << 20, seconds: float = 0.5, repeats: int = 8) -> float:
    """Bytes per second that the first device reads and writes when it adds 1 to an array larger than its caches."""
    add = jax.jit(lambda x: jax.lax.fori_loop(0, repeats, lambda _, x: x + 1, x))
    x = jnp.zeros(size // 4, jnp.float32)
    float(add(x)[0])
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start_time = time.perf_counter()
        float(add(x)[0])
        best = max(best, 2 * repeats * size / (time.perf_counter() - start_time))
    return best


class MatmulSpeed(NamedTuple):
    """FLOP/s of matrix products, and whether no other program disturbed the measurement."""

    flops: float
    undisturbed: bool


@functools.cache
def matmul_speed(dtype: str, size: int = 1024, seconds: float = 0.2) -> MatmulSpeed:
    """Of large products on the first device. What other programs do on a GPU cannot be seen: taken for nothing."""
    x = jnp.ones((size * 2, size), dtype)
    w = jnp.ones((size, size * 2), dtype)
    product = jax.jit(jnp.matmul)
    float(product(x, w)[0, 0])  # a host read: block_until_ready is a no-op on some plugins
    best, count, end = 0.0, 4, time.perf_counter() + seconds
    before = CpuTimes.now()
    while time.perf_counter() < end:
        start_time = time.perf_counter()
        products = [product(x, w) for _ in range(count)]
        float(products[-1][0, 0])
        best = max(best, count * 8 * size**3 / (time.perf_counter() - start_time))
    on_cpu = jax.local_devices()[0].platform == "cpu"
    return MatmulSpeed(best, not on_cpu or CpuTimes.now().is_undisturbed_since(before))


def _jax_platforms(platform: str, plugin: str) -> str | None:
    """The value of JAX_PLATFORMS. The CPU is there beside a GPU, for comparison; None lets JAX choose."""
    metal = f"{machine.METAL_PLUGINS[plugin].platform},cpu" if plugin else None
    return {"cpu": "cpu", "cuda": "cuda,cpu", "metal": metal, "auto": metal}[platform]


def _usable_memory(platform: str, plugin: str, device: Any) -> int:
    if platform == "cpu":
        return machine.total_memory()
    try:
        stats = device.memory_stats() or {}
    except Exception:  # not every plugin counts its memory
        stats = {}
    return int(stats.get("bytes_limit", 0)) or machine.gpu_working_set(plugin)


def _cache_compilations() -> None:
    """Keeps compiled programs for the next start, in the user's cache folder (or JAX_COMPILATION_CACHE_DIR)."""
    folder = machine.cache_file("xla")
    if folder and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _set_xla_flags() -> None:
    """Sets flags that XLA reads when it starts, except those that the user has set.

    On CPUs with AVX-512, XLA uses vectors of 512 bits instead of 256. On NVIDIA GPUs it overlaps communication between
    devices with computation (JAX's guide to GPU performance).
    """
    wanted = {}
    if machine.has_avx512() and _jax_version() >= (0, 11):
        wanted["--xla_cpu_prefer_vector_width"] = "512"
    if machine.has_cuda_plugin():
        wanted["--xla_gpu_enable_latency_hiding_scheduler"] = "true"
    flags = os.environ.get("XLA_FLAGS", "")
    flags = " ".join([flags, *(f"{name}={value}" for name, value in wanted.items() if name not in flags)]).strip()
    if flags:
        os.environ["XLA_FLAGS"] = flags


def _cudnn_attention_works() -> bool:
    """Whether cuDNN's flash attention and its gradient run here: not on every GPU, and not without cuDNN."""

    def attend(x: jax.Array) -> jax.Array:
        mixed = jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn")
        return jnp.sum(mixed.astype(jnp.float32))

    try:
        jax.block_until_ready(jax.jit(jax.grad(attend))(jnp.zeros((1, 128, 1, 64), jnp.bfloat16)))
    except Exception:  # whatever JAX, XLA or cuDNN raise
        return False
    return True


def _jax_version() -> tuple[int, ...]:
    return tuple(int(part) for part in jax.__version__.split(".")[:2])


def _quiet_libraries() -> None:
    """Turns off warnings that a user can do nothing about, and that would break the progress bar."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=UserWarning, module="jax|orbax|flax|grain")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="jax|orbax|flax|grain")
    for name in ("absl", "orbax", "jax._src.xla_bridge", "jax._src.compilation_cache"):
        logging.getLogger(name).setLevel(logging.ERROR)
