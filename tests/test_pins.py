"""The extras for Apple GPUs install on a Mac: their pins are resolved for macOS 14 on arm64 from wherever this is."""

import json
import re
import subprocess
import sys
import tomllib

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETS = [
    ("metal", "3.12", "metal", {"jax-mps": "0.11.1", "jax": "0.11.2"}),
    ("metal", "3.13", "metal", {"jax-mps": "0.11.1", "jax": "0.11.2"}),
    ("jax-metal", "3.11", "jax-metal-py311", {"jax-metal": "0.1.1", "jax": "0.4.34", "flax": "0.10.0"}),
    ("jax-metal", "3.12", "jax-metal-py312", {"jax-metal": "0.1.1", "jax": "0.4.34", "flax": "0.10.3"}),
]


def wanted(extra: str, python: str, machine: str = "arm64") -> list[Requirement]:
    """What a Mac is asked to install: pip would judge the markers by the machine it runs on."""
    mac = {"sys_platform": "darwin", "platform_machine": machine, "python_version": python, "extra": extra}
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]
    found = [Requirement(line) for line in lines]
    found = [requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate(mac)]
    for requirement in found:
        requirement.marker = None
    return found


def pip_resolves(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    where = ["--platform=macosx_14_0_arm64", "--platform=macosx_11_0_arm64", f"--python-version={python}"]
    how = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--implementation=cp", "--quiet", "--report=-"]
    command = [sys.executable, "-m", "pip", "install", *how, *where, "--target=nowhere", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def index() -> None:
    """Skips where pip finds no index of packages."""
    if pip_resolves("3.12", "absl-py").returncode:
        pytest.skip("pip reaches no index of packages from here")


@pytest.mark.slow
@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(("extra", "python", "constraints", "expected"), SETS)
def test_the_pins_resolve_for_a_mac(extra, python, constraints, expected):
    file = ROOT / ".ci" / "constraints" / f"{constraints}.txt"
    done = pip_resolves(python, f"--constraint={file}", *map(str, wanted(extra, python)))
    assert done.returncode == 0, done.stderr[-2000:]
    installed = {item["metadata"]["name"].lower(): item["metadata"] for item in json.loads(done.stdout)["install"]}
    assert {name: installed[name]["version"] for name in expected} == expected
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", file.read_text(), flags=re.MULTILINE))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    loose = {name for name in installed if pinned.get(name.replace("_", "-")) not in (None, installed[name]["version"])}
    assert not loose


@pytest.mark.parametrize(("extra", "python"), [("metal", "3.11"), ("jax-metal", "3.13")])
def test_an_extra_whose_marker_is_false_asks_for_nothing_more(extra, python):
    """Which is why machine.why_no_metal must say so."""
    assert len(wanted(extra, python)) == len(PROJECT["dependencies"])
    assert len(wanted(extra, "3.12", "x86_64")) == len(PROJECT["dependencies"])


@pytest.mark.parametrize("extra", ["metal", "jax-metal"])
def test_an_extra_brings_one_plugin(extra):
    plugins = {"jax-mps", "jax-metal", "metaljax", "jax-graft"}
    assert len(plugins & {requirement.name for requirement in wanted(extra, "3.12")}) == 1


@pytest.mark.parametrize(
    ("constraints", "extras"),
    [
        ("py311", "wandb tensorboard hub serve convert eval clients dev"),
        ("py312", "wandb tensorboard hub serve convert eval clients ray cluster dev"),
        ("interop", "convert eval dev interop"),
    ],
)
def test_what_an_extra_asks_for_is_pinned(constraints, extras):
    """Otherwise the environment of tomorrow is not the one that was tested."""
    text = (ROOT / ".ci" / "constraints" / f"{constraints}.txt").read_text()
    pinned = {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", text, flags=re.MULTILINE)}
    for extra in extras.split():
        asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]
        assert not {Requirement(line).name.lower().replace("_", "-") for line in asked} - pinned, extra
