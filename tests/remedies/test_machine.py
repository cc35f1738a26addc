"""What is said of platforms, plugins, devices and the environment is done, and JAX starts."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import fake_plugins
import jax
import pytest
from helpers import ROOT, build_config
from remedies.messages import messages

from tale_jax.hardware import machine
from tale_jax.hardware.sharding import make_mesh
from tale_jax.planning import doctor

START = (
    "import sys; from tale_jax.hardware.backend import start_backend; "
    "print(start_backend(sys.argv[1]).platform, end='')"
)


def start(folder: Path, platform: str, **more: str) -> subprocess.CompletedProcess:
    return fake_plugins.run_python(folder, "-c", START, platform)


def uninstall(folder: Path, name: str) -> None:
    """What `pip uninstall` does."""
    (info,) = folder.glob(f"{name.replace('-', '_')}-*.dist-info")
    shutil.rmtree(info)


@pytest.mark.parametrize("installed", [["jax-mps"], ["jax-mps", "jax-metal"]])
def test_a_plugin_that_is_uninstalled_as_told_is_no_harm(tmp_path, installed):
    for name in installed:
        fake_plugins.install(tmp_path, name, fake_plugins.ABORTS, "0.1.1")
    left = set(installed)
    for _ in installed:
        done = start(tmp_path, "auto")
        assert done.returncode == 1
        told = re.search(r"pip uninstall ([\w-]+)(?: to train on the CPU)?", done.stderr.splitlines()[-1])
        assert told and told[1] in left, done.stderr
        uninstall(tmp_path, told[1])
        left.remove(told[1])
    done = start(tmp_path, "auto")
    assert done.stdout == "cpu" and not left, done.stderr


@pytest.mark.slow
def test_another_platform_starts_as_told(tmp_path):
    broken = f"import jax\ndef devices(): raise RuntimeError('no such device')\njax.devices = devices\n{START}"
    for code in (START, broken):
        done = fake_plugins.run_python(tmp_path, "-c", code, "cuda")
        told = re.search(r"try (\w+)(?: or (\w+)|, which takes what there is)?$", done.stderr.splitlines()[-1])
        assert told, done.stderr
        assert {start(tmp_path, platform).stdout for platform in told.groups() if platform} == {"cpu"}
    code = f"import os; os.environ['JAX_PLATFORMS'] = 'cpu'; {START}"
    done = fake_plugins.run_python(tmp_path, "-c", code, "cuda")
    assert "unset JAX_PLATFORMS (it is cpu)" in done.stderr.splitlines()[-1]
    done = start(tmp_path, "metal")
    assert "backend.platform=metal is not possible here" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("devices", [2, 3, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {"mesh.fsdp": 5},
        {"mesh.fsdp": 3, "mesh.data": 3},
        {"mesh.data": 7},
        {"mesh.tensor": 2, "mesh.data": 7},
        {"mesh.tensor": 3, "mesh.fsdp": 2},
        {"mesh.tensor": 4, "model.num_kv_heads": 2},
        {"mesh.tensor": 2, "model.mlp_dim": 513},
        {"mesh.tensor": 2, "tokenizer.vocab_size": 511},
        {"mesh.fsdp": 8, "model.embed_dim": 36},
        {"mesh.tensor": 2, "batch_size": 13},
        {"batch_size": 13},
        {"batch_size": 12, "micro_batch_size": 3},
        {"batch_size": 48, "micro_batch_size": 4},
        {"batch_size": 50, "micro_batch_size": 10},
        {"batch_size": 1},
    ],
    ids=str,
)
def test_devices_share_a_batch_as_advised(devices, settings):
    """One remedy for the mesh and one for the batch are enough, and the batch does not grow where it need not."""
    settings = {"batch_size": 24} | settings
    wanted = settings["batch_size"]
    for _ in range(3):
        try:
            mesh = make_mesh(build_config(**settings), jax.devices()[:devices])
        except ValueError as error:
            advised = dict(re.findall(r"--config\.([\w.]+)=(\d+)", str(error).partition("; try ")[2]))
            settings |= {name: int(value) for name, value in advised.items()}
        else:
            assert mesh.size == devices and settings["batch_size"] <= max(wanted, devices)
            return
    pytest.fail("the advice did not help")


def test_what_is_advised_to_make_can_be_made(monkeypatch, tmp_path):
    """Every `make …` in a message, with its extras: make knows the target, and pyproject.toml the extras."""
    said = [machine.no_plugin_reason()]
    monkeypatch.setattr(machine, "is_apple_silicon", lambda: True)
    for python, macos in (((3, 11), (14, 5)), ((3, 13), (13, 6)), ((3, 13), (15, 1))):
        monkeypatch.setattr(machine.sys, "version_info", (*python, 0))
        monkeypatch.setattr(machine, "macos_version", lambda macos=macos: macos)
        said.append(machine.no_plugin_reason())
    assert "update macOS, or train on the CPU" in said[2] and machine.starts_on_cpu()
    monkeypatch.undo()
    versions = {"jax": "0.11.2", "jax-metal": "0.1.1"}
    monkeypatch.setattr(machine, "version", lambda name: versions.get(name, ""))
    said.append(machine.unmet_requirement("jax-metal"))
    monkeypatch.setattr(machine, "start_failure", lambda plugin: "it aborts")
    monkeypatch.setattr(machine, "disk_speed", lambda folder: 1e9)
    monkeypatch.setattr(doctor, "_measure_in_subprocess", lambda *_: {"error": "one"})
    monkeypatch.setattr(doctor.environment, "changed_variables", dict)
    said += doctor.examine(tmp_path)["advice"]
    facts = {"precision": "float32", "platform": "cpu", "memory_bytes": int(5e9), "note": ""}
    said += doctor._advice(facts)
    text = "\n".join([*said, *(message.template.replace("{}", "metal") for message in messages())])
    commands = set(re.findall(r"\bmake (?:env|clean)(?: [A-Z]+=[\w.,-]+)*", text))
    assert {"make clean", "make env", "make env EXTRAS=dev,metal", "make env EXTRAS=dev,jax-metal"} <= commands
    extras = (ROOT / "pyproject.toml").read_text()
    for command in sorted(commands):
        done = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        for extra in (re.search(r"EXTRAS=(\S+)", command) or [None, ""])[1].split(","):
            assert not extra or re.search(rf"^{extra} = \[", extras, re.MULTILINE), command
    scripts = set(re.findall(r"python (launch/\w+\.py) (--config=\S+)", text))
    assert scripts
    for script, flag in scripts:
        done = subprocess.run([sys.executable, script, flag, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and flag.partition("=")[0] in done.stdout
        assert (ROOT / flag.partition("=")[2].partition(":")[0]).is_file()


def test_a_variable_that_keeps_jax_from_starting_is_taken_away(monkeypatch, tmp_path):
    """A module of another project stands in the way of one that JAX imports: without PYTHONPATH it starts."""
    (tmp_path / "ml_dtypes.py").write_text("raise RuntimeError('made for another project')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor.examine(tmp_path)
    assert any("made for another project" in problem for problem in found["problems"]), found["problems"]
    advised = next(re.search(r"env( -u \w+)+", line) for line in found["advice"] if "try without" in line)
    start = [sys.executable, "-c", "import jax.numpy as jnp; print(int(jnp.ones(2).sum()))"]
    assert subprocess.run(start, cwd=ROOT, capture_output=True).returncode == 1
    done = subprocess.run([*advised[0].split(), *start], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["2"], done.stderr
