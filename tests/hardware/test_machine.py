"""What is known of a machine without JAX: plugins and the reasons why they fail, memory, disk."""

import os
import sys
from pathlib import Path

import fake_plugins
import numpy as np
import pytest

from tale_jax.hardware import machine


@pytest.fixture
def installed(monkeypatch):
    """Versions of distributions that are taken for installed; a Mac on which any Metal plugin could run."""
    versions = {"jax": "0.11.2"}
    monkeypatch.setattr(machine, "version", lambda name: versions.get(name, ""))
    monkeypatch.setattr(machine, "is_apple_silicon", lambda: True)
    monkeypatch.setattr(machine, "macos_version", lambda: (27, 0))
    monkeypatch.setattr(machine.sys, "version_info", (3, 13, 0))
    return versions


def test_versions_are_of_what_is_installed():
    assert machine.version("numpy") == np.__version__
    assert machine.version("no-such-distribution") == ""


def test_one_plugin_may_be_installed(installed):
    assert machine.metal_plugin() == ""
    installed["jax-metal"] = "0.1.1"
    assert machine.metal_plugin() == "jax-metal"
    installed["jax-mps"] = "0.11.1"
    with pytest.raises(ValueError, match="jax-mps and jax-metal are installed and clash; pip uninstall jax-metal"):
        machine.metal_plugin()


@pytest.mark.parametrize(
    ("python", "macos", "arm", "words"),
    [
        ((3, 13), (14, 0), False, "Apple GPUs need a Mac with Apple silicon"),
        ((3, 11), (14, 5), True, "installs nothing on Python 3.11"),
        ((3, 13), (13, 6), True, "jax-mps needs macOS 14"),
        ((3, 13), (15, 1), True, "make env EXTRAS=dev,metal"),
    ],
)
def test_no_plugin_reason_names_what_the_marker_skipped(installed, monkeypatch, python, macos, arm, words):
    monkeypatch.setattr(machine, "is_apple_silicon", lambda: arm)
    monkeypatch.setattr(machine, "macos_version", lambda: macos)
    monkeypatch.setattr(machine.sys, "version_info", (*python, 0))
    assert words in machine.no_plugin_reason()


@pytest.mark.parametrize(
    ("plugin", "python", "macos", "jax", "words"),
    [
        ("jax-mps", (3, 11), (15, 0), "0.11.2", "jax-mps needs Python 3.12"),
        ("jax-mps", (3, 13), (13, 6), "0.11.2", "jax-mps needs macOS 14.0"),
        ("jax-metal", (3, 12), (15, 0), "0.11.2", "jax-metal 0.1.1 needs jax 0.4.34 to 0.5.0, and this is 0.11.2"),
        ("jax-metal", (3, 12), (15, 0), "0.4.34", ""),
        ("jax-metal", (3, 12), (15, 0), "0.5.0", ""),
        ("jax-mps", (3, 12), (14, 0), "0.11.2", ""),
    ],
)
def test_what_a_plugin_needs_and_the_machine_lacks(installed, monkeypatch, plugin, python, macos, jax, words):
    installed["jax"] = jax
    monkeypatch.setattr(machine, "macos_version", lambda: macos)
    monkeypatch.setattr(machine.sys, "version_info", (*python, 0))
    found = machine.unmet_requirement(plugin)
    assert found.startswith(words) and bool(found) == bool(words)


def test_a_plugin_is_tried_once_for_its_versions_and_only_success_is_kept(installed, monkeypatch, tmp_path):
    results = iter(["signal 6: abort", "", ""])
    tried = []

    def run_code(code, env, timeout):
        tried.append(env["JAX_PLATFORMS"])
        return machine.run([sys.executable, "-c", "print(3.0)"]) if not next(results) else machine.run(["false"])

    monkeypatch.setattr(machine, "run_code", run_code)
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path)
    assert machine.start_failure("jax-mps") == "exit code 1: nothing on stderr"
    assert machine.start_failure("jax-mps") == machine.start_failure("jax-mps") == ""
    assert tried == ["mps", "mps"]
    installed["jax"] = "0.12.0"
    assert machine.start_failure("jax-mps") == ""
    assert len(tried) == 3


def test_a_plugin_that_computes_a_wrong_sum_has_failed(installed, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "run_code", lambda *args, **kwargs: machine.run([sys.executable, "-c", "print(2.0)"]))
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path / "file" / "cannot be made")
    (tmp_path / "file").touch()
    assert machine.start_failure("jax-mps") == "it computes a wrong sum"
    monkeypatch.setattr(machine.sys, "version_info", (3, 11, 0))
    assert machine.start_failure("jax-mps") == "jax-mps needs Python 3.12 (it computes a wrong sum)"


def test_jax_starts_on_the_cpu_unless_a_plugin_aborts_it(tmp_path):
    code = "from tale_jax.hardware import machine; print(machine.starts_on_cpu())"
    assert fake_plugins.run_python(tmp_path, "-c", code).stdout == "True\n"
    fake_plugins.install(tmp_path, "jax-mps", fake_plugins.ABORTS)
    assert fake_plugins.run_python(tmp_path, "-c", code).stdout == "False\n"


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (limit, tmp_path / "absent"))
    whole = machine.total_memory()
    assert whole > 1 << 30
    for text, expected in (("max\n", whole), (f"{1 << 30}\n", 1 << 30), (f"{whole * 2}\n", whole)):
        limit.write_text(text)
        assert machine.total_memory() == expected


def test_an_apple_gpu_has_two_thirds_of_the_memory(monkeypatch):
    monkeypatch.setattr(machine, "total_memory", lambda: 9 * 10**9)
    assert machine.gpu_working_set("jax-mps") == machine.apple_gpu_memory(9 * 10**9) == 6 * 10**9
    assert machine.gpu_working_set("") == 0


def test_resident_memory_grows_with_what_is_held_and_its_peak_stays():
    before, size = machine.resident_memory(), 64 << 20
    held = np.ones(size, np.uint8)
    assert machine.resident_memory() - before > size / 2
    assert machine.peak_resident_memory() > 0.99 * machine.resident_memory()  # the kernel counts each in its own way
    del held
    assert machine.peak_resident_memory() >= before + size / 2


def test_freed_blocks_are_kept_until_they_are_released():
    """Many blocks below the threshold are kept when freed; `release_memory` gives them back."""
    code = (
        "import ctypes; from tale_jax.hardware import machine as m\n"
        "m.keep_freed_memory(); libc = ctypes.CDLL('libc.so.6')\n"
        "libc.malloc.restype = ctypes.c_void_p; libc.free.argtypes = [ctypes.c_void_p]\n"
        "before = m.resident_memory(); blocks = [libc.malloc(16 << 20) for _ in range(8)]\n"
        "for block in blocks: ctypes.memset(block, 1, 16 << 20)\n"
        "for block in blocks: libc.free(block)\n"
        "kept = m.resident_memory() - before; m.release_memory(); left = m.resident_memory() - before\n"
        "print(kept > 100 << 20, left < 20 << 20)\n"
    )
    if machine._glibc_function("mallopt") is None:
        pytest.skip("no glibc here")
    result = machine.run([sys.executable, "-c", code], env={"PYTHONPATH": str(Path(machine.__file__).parents[2])})
    assert result.stdout == "True True\n", result


def test_the_disk_is_written_and_left_as_it_was(tmp_path):
    assert machine.disk_speed(tmp_path, size=1 << 20) > 0
    assert not os.listdir(tmp_path)


def test_the_cpu_has_a_name_and_its_cores():
    assert machine.cpu_name().endswith(f", {os.cpu_count()} cores")
    assert not machine.cpu_name().startswith(",")
