"""The peak that speeds are shown as a share of: the fastest large matrix products that this machine was seen to do.

A peak that is measured while other programs compute is too low, and a share of it too high: 75 % where 14 % is true. So
a measurement counts only where nothing disturbed it, the best one is kept in the cache folder, for this device, dtype
and jax, and where there is none, no share is shown.

    peak = matmul_peak_of_all(backend, "bfloat16")  # FLOP/s; 0: not known
"""

import contextlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from tale_jax.hardware.backend import Backend, MatmulSpeed, matmul_speed
from tale_jax.hardware.cpu_times import usable_cores
from tale_jax.hardware.machine import cache_folder
from tale_jax.utils.files import write_atomically

FILE = "matmul_peaks.json"
UNKNOWN_PEAK_NOTE = "no share of the matmul peak: other programs computed while it was measured"


def matmul_peak_of_all(backend: Backend, dtype: Any) -> float:
    """FLOP/s of large matrix products in `dtype` on all devices together; 0 where it was never measured undisturbed."""
    return _best(_key(backend, dtype), matmul_speed(jnp.dtype(dtype).name)) * _num_peaks(backend)


def keep_peak(backend: Backend, dtype: Any, flops: float) -> None:
    """Raises the peak that is kept to FLOP/s that a run was seen to do on all devices together: no share is over 100 %.

    Where no peak is known (`flops` is 0) nothing is kept.
    """
    if flops and (one := flops / _num_peaks(backend)) > _read_peaks().get(_key(backend, dtype), 0.0):
        _best(_key(backend, dtype), MatmulSpeed(one, undisturbed=True))


def _key(backend: Backend, dtype: Any) -> str:
    device = f"{backend.device}, {usable_cores():g} usable" if backend.platform == "cpu" else backend.device
    return f"{device}; {jnp.dtype(dtype).name}; jax {jax.__version__}"


def _num_peaks(backend: Backend) -> int:
    """How often the peak of a device counts. Devices that are simulated on one CPU share its cores."""
    return jax.process_count() if backend.platform == "cpu" else len(backend.devices)


def _best(key: str, speed: MatmulSpeed) -> float:
    """The best peak known for `key`, with this measurement; it is kept, where that is possible."""
    peaks = _read_peaks()
    known = peaks.get(key, 0.0)
    if speed.flops <= known or not (known or speed.undisturbed):
        return known
    if (folder := cache_folder()) is not None:
        with contextlib.suppress(OSError):  # the cache is optional
            write_atomically(folder / FILE, json.dumps(peaks | {key: speed.flops}, indent=2) + "\n")
    return speed.flops


def _read_peaks() -> dict[str, float]:
    if (folder := cache_folder()) is None:
        return {}
    with contextlib.suppress(OSError, ValueError):
        peaks = json.loads((folder / FILE).read_text())
        if isinstance(peaks, dict):
            return {key: float(peak) for key, peak in peaks.items() if isinstance(peak, int | float) and peak > 0}
    return {}
