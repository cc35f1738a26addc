"""Platforms, plugins and precision, on a machine that has none of the plugins: fakes stand in for the broken ones."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT

from tale_jax.hardware import backend, machine
from tale_jax.hardware.backend import start_backend
from tale_jax.planning import doctor
from tale_jax.planning import numerics as probe

RAISES = "def initialize():\n    raise RuntimeError('no Metal device found')\n"
ABORTS = "import os\n\n\ndef initialize():\n    os.abort()\n"


def fake_plugin(folder: Path, name: str, source: str, version: str = "0.11.1") -> None:
    """An installed distribution whose jax plugin does what `source` says."""
    module = f"fake_{name.replace('-', '_')}"
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[jax_plugins]\n{machine.METAL_PLUGINS[name][0]} = {module}\n")


@pytest.fixture
def elsewhere(tmp_path):
    """Runs Python in a machine of its own: a cache folder and a folder of installed fakes, both empty at first."""

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        unset = ("JAX_PLATFORMS", "XLA_FLAGS")
        env = {k: v for k, v in os.environ.items() if k not in unset}
        env |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)

    return run


START = "import sys; from tale_jax import backend; backend = start_backend(sys.argv[1]); print(backend.platform, backend.note)"


def test_a_plugin_that_raises_is_refused_by_name_and_auto_falls_back_aloud(elsewhere, tmp_path):
    fake_plugin(tmp_path, "jax-mps", RAISES)
    asked = elsewhere("-c", START, "metal")
    assert asked.returncode == 1 and "backend.platform=metal does not start here: jax-mps fails" in asked.stderr
    auto = elsewhere("-c", START, "auto")
    assert auto.returncode == 0, auto.stderr
    assert auto.stdout.startswith("cpu falls back to the CPU: jax-mps does not start (")


def test_a_plugin_that_aborts_is_told_before_it_takes_the_process_with_it(elsewhere, tmp_path):
    fake_plugin(tmp_path, "jax-mps", ABORTS)
    for platform in ("metal", "auto"):
        done = elsewhere("-c", START, platform)
        assert done.returncode == 1, done
        assert "it aborts the process by signal 6" in done.stderr and "pip uninstall jax-mps" in done.stderr


def test_two_plugins_are_refused(elsewhere, tmp_path):
    fake_plugin(tmp_path, "jax-mps", RAISES)
    fake_plugin(tmp_path, "jax-metal", RAISES, "0.1.1")
    done = elsewhere("-c", START, "metal")
    assert "jax-mps and jax-metal are installed and clash; pip uninstall jax-metal" in done.stderr


@pytest.mark.parametrize(
    ("source", "word"),
    [pytest.param(RAISES, "jax-mps 0.11.1 does not start", marks=pytest.mark.slow), (ABORTS, "by signal 6")],
    ids=["raises", "aborts"],
)
def test_doctor_survives_a_broken_plugin_and_says_what_to_do(elsewhere, tmp_path, source, word):
    fake_plugin(tmp_path, "jax-mps", source)
    done = elsewhere("launch/doctor.py", f"--folder={tmp_path}", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["plugins"] == {"jax-mps": "0.11.1"}
    assert any(word in problem for problem in found["problems"]), found["problems"]
    assert any("pip uninstall jax-mps" in line for line in found["advice"])
    assert ("error" in found["computes"]) == (source == ABORTS)


@pytest.mark.slow
def test_doctor_is_right_about_this_machine(elsewhere, tmp_path):
    done = elsewhere("launch/doctor.py", f"--folder={tmp_path}", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["machine"]["memory_bytes"] == machine.total_memory() > 0
    assert found["versions"]["jax"] == jax.__version__
    assert not found["problems"]
    computes = found["computes"]
    assert computes["platform"] == "cpu"
    assert {row["dtype"]: row["correct"] for row in computes["probe"]}["float32"]
    assert computes["precision"] in computes["matmul_flops"]
    assert all(rate > 0 for rate in computes["matmul_flops"].values())


def test_doctor_prints_tables_of_what_it_found(capsys):
    finding = probe.DtypeCheck("bfloat16", False, "the probe ended with killed by signal 6: abort")
    here = {"platform": "metal", "device": "M2", "memory_bytes": int(5e9), "memory_bytes_per_second": 9e10}
    here |= {"probe": [vars(finding)], "matmul_flops": {}, "precision": "float32", "precision_reason": "", "note": ""}
    found = {
        "machine": {"system": "Darwin", "cpu": "M2", "memory_bytes": 8e9, "disk_free_bytes": 1e9, "python": "3.12"}
        | {"disk_write_bytes_per_second": 1e9},
        "versions": {"jax": "0.11.2"}, "plugins": {"jax-mps": "0.11.1"}, "computes": here, "problems": ["a problem"],
        "advice": doctor._advice(backend),
    }  # fmt: skip
    doctor.show(found)
    out = capsys.readouterr().out
    assert "killed by" in out and "a problem" in out and "configs/m2_air.py" in out


@pytest.mark.parametrize(
    ("python", "macos", "arm", "words"),
    [
        ((3, 13), (14, 0), False, "Apple GPUs need a Mac with Apple silicon"),
        ((3, 11), (14, 5), True, "installs nothing on Python 3.11"),
        ((3, 13), (13, 6), True, "jax-mps needs macOS 14"),
        ((3, 13), (15, 1), True, "make env EXTRAS=dev,metal"),
    ],
)
def test_why_no_metal_names_what_the_marker_skipped(monkeypatch, python, macos, arm, words):
    monkeypatch.setattr(machine, "is_apple_silicon", lambda: arm)
    monkeypatch.setattr(machine, "macos_version", lambda: macos)
    monkeypatch.setattr(machine.sys, "version_info", (*python, 0))
    assert words in machine.why_no_metal()
    with pytest.raises(ValueError, match=r"backend.platform=metal is not possible here"):
        start_backend("metal")


@pytest.mark.parametrize("dtype", probe.DTYPES)
def test_the_probe_finds_this_cpu_right(cpu, dtype, monkeypatch):
    monkeypatch.setattr(probe, "_tokens_per_second", lambda here, dtype: 1.0)
    found = probe.examine(cpu, dtype)
    assert found.correct, found
    assert (found.decode_error == 0) == (dtype == "float32")


def test_the_probe_finds_a_wrong_product(cpu, monkeypatch):
    """A backend whose products lose a few bits too many is not right."""
    monkeypatch.setattr(probe, "_tokens_per_second", lambda here, dtype: 1.0)
    numbers = probe._numbers
    calls = []

    def wrong(device, dtype, *layout):
        calls.append(dtype)
        found = numbers(device, dtype, *layout)
        return found if len(calls) == 1 else found | {"gradient": 1.2 * found["gradient"]}

    monkeypatch.setattr(probe, "_numbers", wrong)
    found = probe.examine(cpu, "bfloat16")
    assert not found.correct and "gradients 2.0e-01" in found.reason


def finding(dtype: str, correct: bool, rate: float) -> probe.DtypeCheck:
    return probe.DtypeCheck(dtype, correct, "" if correct else "it aborts", tokens_per_second=rate)


@pytest.mark.parametrize(
    ("findings", "dtype"),
    [
        ([finding("float32", True, 100), finding("bfloat16", True, 200)], "bfloat16"),
        ([finding("float32", True, 100), finding("bfloat16", True, 105)], "float32"),
        ([finding("float32", True, 100), finding("bfloat16", False, 900)], "float32"),
    ],
)
def test_auto_takes_the_fastest_correct_dtype(cpu, monkeypatch, findings, dtype):
    monkeypatch.setattr(probe, "probe", lambda here: findings)
    chosen, reason = probe.choose_precision(dataclasses.replace(cpu, platform="metal"), "auto")
    assert chosen == jnp.dtype(dtype) and "100" in why


def test_a_dtype_asked_for_that_is_wrong_is_refused(cpu, monkeypatch):
    monkeypatch.setattr(probe, "probe", lambda here: [finding("float32", True, 1), finding("bfloat16", False, 1)])
    metal = dataclasses.replace(cpu, platform="metal")
    with pytest.raises(
        ValueError, match=r"precision=bfloat16 is not computed rightly on metal \(it aborts\); try prec"
    ):
        probe.choose_precision(metal, "bfloat16")
    monkeypatch.setattr(probe, "probe", lambda here: [finding("float32", False, 1), finding("bfloat16", False, 1)])
    with pytest.raises(ValueError, match=r"try backend.platform=cpu"):
        probe.choose_precision(metal, "auto")


@pytest.mark.parametrize(("peak", "dtype"), [(3e11, "bfloat16"), (1.2e11, "float32"), (5e10, "float32")])
def test_a_cpu_takes_the_dtype_of_the_faster_products_and_is_not_probed(cpu, monkeypatch, peak, dtype):
    monkeypatch.setattr(probe, "probe", lambda here: pytest.fail("probed"))
    monkeypatch.setattr(backend, "matmul_peak", lambda name: {"float32": 1e11, "bfloat16": peak}[name])
    chosen, reason = probe.choose_precision(cpu, "auto")
    assert chosen == jnp.dtype(dtype) and "float32 100 GFLOP/s" in why
    assert probe.choose_precision(cpu, "bfloat16") == (jnp.dtype("bfloat16"), "as the config says")


def test_findings_are_kept_for_these_versions_and_asked_for_again_on_others(cpu, monkeypatch, tmp_path):
    asked = []

    def run(platform, dtype):
        asked.append(dtype)
        return finding(dtype, True, 1.0)

    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(probe, "_run", run)
    assert probe.probe(cpu) == probe.probe(cpu)
    assert asked == list(probe.DTYPES)
    version = machine.version
    monkeypatch.setattr(machine, "version", lambda name: "9.9" if name == "jax" else version(name))
    probe.probe(cpu)
    assert len(asked) == 2 * len(probe.DTYPES)


def test_a_probe_that_dies_is_a_finding(monkeypatch):
    monkeypatch.setattr(probe.sys, "executable", "/bin/false")
    found = probe._run("cpu", "float32")
    assert not found.correct and "exit code 1" in found.reason
