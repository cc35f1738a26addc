"""Platforms and plugins, on a machine that has none of the plugins: fakes stand in for the broken ones."""

import dataclasses
import os

import fake_plugins
import jax
import jax.numpy as jnp
import pytest

from tale_jax.hardware import backend as backend_module
from tale_jax.hardware import machine
from tale_jax.hardware.backend import for_mac, for_platform, start_backend, tracing_for_metal

START = (
    "import sys; from tale_jax.hardware.backend import start_backend; "
    "backend = start_backend(sys.argv[1]); print(backend.platform, backend.note)"
)


def test_a_plugin_that_raises_is_refused_by_name_and_auto_falls_back_and_says_so(tmp_path):
    fake_plugins.install(tmp_path, "jax-mps", fake_plugins.RAISES)
    metal = fake_plugins.run_python(tmp_path, "-c", START, "metal")
    assert metal.returncode == 1 and "backend.platform=metal does not start here: jax-mps fails" in metal.stderr
    auto = fake_plugins.run_python(tmp_path, "-c", START, "auto")
    assert auto.returncode == 0, auto.stderr
    assert auto.stdout.startswith("cpu falls back to the CPU: jax-mps does not start (")


def test_a_plugin_that_aborts_is_refused_before_it_ends_the_process(tmp_path):
    fake_plugins.install(tmp_path, "jax-mps", fake_plugins.ABORTS)
    for platform in ("metal", "auto"):
        done = fake_plugins.run_python(tmp_path, "-c", START, platform)
        assert done.returncode == 1, done
        assert (
            "jax-mps fails (" in done.stderr and "signal 6: " in done.stderr and "pip uninstall jax-mps" in done.stderr
        )


def test_two_plugins_are_refused(tmp_path):
    fake_plugins.install(tmp_path, "jax-mps", fake_plugins.RAISES)
    fake_plugins.install(tmp_path, "jax-metal", fake_plugins.RAISES, "0.1.1")
    done = fake_plugins.run_python(tmp_path, "-c", START, "metal")
    assert "jax-mps and jax-metal are installed and clash; pip uninstall jax-metal" in done.stderr


def test_metal_without_a_plugin_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"backend.platform=metal is not possible here: Apple GPUs need a Mac"):
        start_backend("metal")


def test_a_gpu_that_jax_does_not_start_is_refused(tmp_path):
    done = fake_plugins.run_python(tmp_path, "-c", START, "cuda")
    assert done.returncode == 1
    assert "backend.platform=cuda " in done.stderr.splitlines()[-1]


def test_the_platform_of_the_environment_is_not_changed_behind_ones_back():
    """This process was started with JAX_PLATFORMS=cpu."""
    with pytest.raises(ValueError, match=r"backend.platform=cuda is not what JAX starts here \(cpu\)"):
        start_backend("cuda")


def test_the_cpu_is_described(cpu):
    assert (cpu.platform, cpu.plugin, cpu.device) == ("cpu", "", machine.cpu_name())
    assert cpu.memory == machine.total_memory()
    assert not cpu.overlap_io and not cpu.cudnn_attention
    assert cpu.donate == (backend_module._jax_version() >= (0, 5))
    assert cpu.materialize_transposes == (backend_module._jax_version() >= (0, 11))


def test_choices_follow_the_platform(cpu):
    metal, cuda = for_platform(cpu, "metal"), for_platform(cpu, "cuda")
    assert (metal.platform, metal.overlap_io, metal.donate, metal.materialize_transposes) == (
        "metal",
        True,
        False,
        False,
    )
    assert (cuda.platform, cuda.overlap_io, cuda.donate, cuda.materialize_transposes) == ("cuda", True, True, False)
    assert for_platform(metal, "cpu") == cpu
    mac = for_mac(dataclasses.replace(cpu, note="a note"), 9 * 10**9)
    assert (mac.platform, mac.memory, mac.note) == ("metal", 6 * 10**9, "")


def test_old_jax_on_a_cpu_donates_nothing_and_keeps_its_products(cpu, monkeypatch):
    monkeypatch.setattr(backend_module, "_jax_version", lambda: (0, 4))
    old = for_platform(cpu, "cpu")
    assert not old.donate and not old.materialize_transposes
    assert for_platform(cpu, "cuda").donate


def test_random_bits_do_not_depend_on_the_mesh_but_where_metal_is_traced_for():
    assert jax.config.jax_threefry_partitionable
    with pytest.raises(ValueError, match="stop"), tracing_for_metal():
        assert not jax.config.jax_threefry_partitionable
        raise ValueError("stop")
    assert jax.config.jax_threefry_partitionable


def test_the_peak_of_products_is_measured_once():
    peak = backend_module.matmul_peak(jnp.float32)
    assert peak > 1e8
    assert backend_module.matmul_peak("float32") == peak
    assert backend_module.memory_bandwidth(size=1 << 20, seconds=0.0) == 0.0  # no time, no measurement
    assert backend_module.memory_bandwidth(size=1 << 20, seconds=0.01) > 1e6


def test_flags_of_the_user_win(monkeypatch):
    monkeypatch.setattr(machine, "has_avx512", lambda: True)
    monkeypatch.setattr(machine, "has_cuda_plugin", lambda: True)
    monkeypatch.setattr(backend_module, "_jax_version", lambda: (0, 11))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256")
    backend_module._set_xla_flags()
    expected = "--xla_cpu_prefer_vector_width=256 --xla_gpu_enable_latency_hiding_scheduler=true"
    assert os.environ["XLA_FLAGS"] == expected
    monkeypatch.delenv("XLA_FLAGS")
    backend_module._set_xla_flags()
    assert "--xla_cpu_prefer_vector_width=512" in os.environ["XLA_FLAGS"]


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path):
    code = (
        f"import os; os.environ.pop('JAX_COMPILATION_CACHE_DIR', ''); {START}; "
        "import jax; jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0); "
        "jax.jit(lambda x: jax.numpy.linalg.svd(x @ x))(jax.numpy.ones((64, 64)))"
    )
    done = fake_plugins.run_python(tmp_path, "-c", code, "cpu")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache" / "tale_jax" / "xla").iterdir())
