"""The peak that speeds are shown as a share of: only what nothing disturbed counts, and the best of it is kept."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest

from tale_jax.hardware import backend as backend_module
from tale_jax.hardware import peak
from tale_jax.hardware.backend import MatmulSpeed
from tale_jax.hardware.cpu_times import CpuTimes, usable_cores


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Sets what the next measurement gives; the cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def measure(flops, undisturbed):
        monkeypatch.setattr(peak, "matmul_speed", lambda name: MatmulSpeed(flops, undisturbed))

    return measure


def test_the_best_undisturbed_measurement_is_kept(cpu, measured, tmp_path):
    measured(1e9, False)
    assert peak.matmul_peak_of_all(cpu, "float32") == 0  # nothing that could be trusted
    measured(5e9, True)
    assert peak.matmul_peak_of_all(cpu, "float32") == 5e9
    measured(1e9, False)  # a busy machine, later
    assert peak.matmul_peak_of_all(cpu, "float32") == 5e9
    measured(6e9, False)  # whoever computed beside it, the peak is at least that
    assert peak.matmul_peak_of_all(cpu, "float32") == 6e9
    [(key, kept)] = json.loads((tmp_path / "tale_jax" / "matmul_peaks.json").read_text()).items()
    assert kept == 6e9 and cpu.device in key and "float32" in key and "jax " in key


def test_what_a_run_was_seen_to_do_raises_the_peak_that_is_kept(cpu, measured):
    peak.keep_peak(cpu, "float32", 0.0)  # nothing was known
    measured(5e9, True)
    assert peak.matmul_peak_of_all(cpu, "float32") == 5e9
    peak.keep_peak(cpu, "float32", 4e9)
    assert peak.matmul_peak_of_all(cpu, "float32") == 5e9
    peak.keep_peak(cpu, "float32", 7e9)
    assert peak.matmul_peak_of_all(cpu, "float32") == 7e9
    gpus = dataclasses.replace(cpu, platform="cuda", devices=(*cpu.devices, *cpu.devices))
    peak.matmul_peak_of_all(gpus, "float32")
    peak.keep_peak(gpus, "float32", 24e9)
    assert peak.matmul_peak_of_all(gpus, "float32") == 24e9


def test_each_device_and_dtype_has_a_peak_of_its_own(cpu, measured):
    measured(5e9, True)
    assert peak.matmul_peak_of_all(cpu, "float32") == 5e9
    measured(1e9, False)
    assert peak.matmul_peak_of_all(cpu, "bfloat16") == 0
    assert peak.matmul_peak_of_all(dataclasses.replace(cpu, device="another"), "float32") == 0


def test_gpus_have_a_peak_each_and_devices_simulated_on_one_cpu_share_it(cpu, measured):
    measured(5e9, True)
    two = dataclasses.replace(cpu, devices=(*cpu.devices, *cpu.devices))
    assert peak.matmul_peak_of_all(two, "float32") == 5e9
    assert peak.matmul_peak_of_all(dataclasses.replace(two, platform="cuda"), "float32") == 10e9


@pytest.mark.parametrize("content", ["", "[1]", '{"a": "b"}', "{", "\xff"])
def test_the_cache_is_optional(cpu, measured, tmp_path, content):
    (tmp_path / "tale_jax").mkdir()
    (tmp_path / "tale_jax" / "matmul_peaks.json").write_text(content, encoding="latin-1")
    measured(5e9, True)
    assert peak.matmul_peak_of_all(cpu, "float32") == 5e9


def test_no_cache_folder_at_all(cpu, measured, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    measured(5e9, True)
    assert peak.matmul_peak_of_all(cpu, "float32") == 5e9


def test_programs_that_compute_beside_a_measurement_are_noticed():
    """Real ones: three times as many as there are processors."""
    endless = [sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"]
    others = [subprocess.Popen(endless, stdout=subprocess.PIPE) for _ in range(3 * int(usable_cores() + 1))]
    try:
        for other in others:
            assert other.stdout and other.stdout.read(1)
        before, end = CpuTimes.now(), time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
        assert not CpuTimes.now().is_undisturbed_since(before)
    finally:
        for other in others:
            other.kill()
            other.communicate()


def test_what_makes_a_measurement_undisturbed(monkeypatch):
    monkeypatch.setattr("tale_jax.hardware.cpu_times.usable_cores", lambda: 2.0)
    start = CpuTimes(10.0, 3.0, 100.0)
    assert CpuTimes(11.0, 4.9, 200.0).is_undisturbed_since(start)  # nearly all of two processors
    assert CpuTimes(11.0, 4.0, 101.1).is_undisturbed_since(start)  # half of them, but nobody else wanted more
    assert not CpuTimes(11.0, 4.0, 102.0).is_undisturbed_since(start)
    assert not CpuTimes(11.0, 4.0, None).is_undisturbed_since(dataclasses.replace(start, all=None))


def test_a_measurement_says_whether_it_was_disturbed(cpu):
    speed = backend_module.matmul_speed("float32")
    assert speed.flops == backend_module.matmul_peak("float32") and isinstance(speed.undisturbed, bool)
