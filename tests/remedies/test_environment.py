"""What is said of the Python, the environment, the current folder and paths is done, and the script runs."""

import contextlib
import importlib
import io
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fake_plugins
import pytest
from helpers import ROOT

from tale_jax.hardware import machine
from tale_jax.planning import doctor
from tale_jax.utils.paths import expanded, fault_of

START = "from tale_jax.hardware.backend import start_backend; print(start_backend('cpu').platform, end='')"
SCRIPT = """
import sys
sys.path.insert(0, "launch")
from cli import run

def main(_):
    import jax
    {}
    print("done")

run(main)
"""


def run_python(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_P", "XLA_"))}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=plain | env, capture_output=True, text=True)


def mistake(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["JAX_DEBUG_NANS", "JAX_NUMPY_RANK_PROMOTION", "JAX_ENABLE_X64"])
def test_a_variable_of_jax_that_is_unset_as_told_is_no_harm(name):
    value, code = {
        "JAX_DEBUG_NANS": ("1", "jax.numpy.log(-1.0)"),
        "JAX_NUMPY_RANK_PROMOTION": ("odd", "jax.devices()"),
        "JAX_ENABLE_X64": ("odd", "jax.devices()"),
    }[name]
    script = SCRIPT.format(code)
    line = mistake(run_python("-c", script, JAX_PLATFORMS="cpu", **{name: value}))
    assert name in line and re.search("unset (it|what is set)", line)
    assert run_python("-c", script, JAX_PLATFORMS="cpu").stdout == "done\n"


def test_variables_that_are_unset_as_told_are_no_harm(tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    for wrong in ({"JAX_PLATFORMS": "nonsense"}, {"XLA_FLAGS": "--xla_no_such_flag=1"}):
        done = run_python("-c", START, **cache, **wrong)
        (name, value), line = *wrong.items(), done.stderr.splitlines()[-1]
        assert f"{name}={value} keeps" in line or f'{name}="{value}" keeps' in line
        assert "unset it" in line
        assert run_python("-c", START, **cache).stdout == "cpu"
        if told := re.search(r"set (\w+)=(\w+)$", line):
            assert run_python("-c", START, **cache, **{told[1]: told[2]}).stdout == "cpu"


def test_another_platform_than_jax_starts_is_chosen_as_told(tmp_path):
    code = (
        "import tale_jax.hardware.backend as backend; backend._jax_platforms = lambda *_: 'cpu'; "
        "print(backend.start_backend({!r}).platform)"
    )
    done = fake_plugins.run_python(tmp_path, "-c", code.format("cuda"))
    told = re.search(
        r"is not what JAX starts here \(cpu\); try (\w+), which takes what there is$", done.stderr.splitlines()[-1]
    )
    assert told, done.stderr
    assert fake_plugins.run_python(tmp_path, "-c", code.format(told[1])).stdout == "cpu\n"


def test_the_environment_that_is_made_as_told_is_used(tmp_path):
    """`make env` makes .venv, here a link to one that it made; from then on any Python will do."""
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "tale_jax").symlink_to(ROOT / "tale_jax")
    command = ["-S", "-E", str(tmp_path / "launch" / "plan.py"), "--help"]
    told = re.search(r"it lacks absl.*; run `(make env)` in (\S+), then `source (\S+)`", mistake(run_python(*command)))
    assert told and told[2] == str(tmp_path) and told[3] == str(tmp_path / ".venv/bin/activate")
    assert subprocess.run([*told[1].split(), "-n"], cwd=ROOT, capture_output=True).returncode == 0
    (tmp_path / ".venv").symlink_to(sys.prefix)
    done = run_python(*command)
    assert done.returncode == 0 and "--config" in done.stdout, done.stderr


def test_a_library_that_is_missing_is_installed_as_told(tmp_path):
    script = SCRIPT.format("import no_such_library")
    line = mistake(run_python("-c", script))
    told = re.search(r"cannot import no_such_library .*; run `(make env)` in (\S+)$", line)
    assert told and Path(told[2]) == ROOT
    (tmp_path / "no_such_library.py").touch()
    assert run_python("-c", script, PYTHONPATH=str(tmp_path)).stdout == "done\n"


def test_from_a_folder_that_exists_a_script_runs(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"rmdir '{gone}'; exec '{sys.executable}' '{ROOT}/launch/plan.py' --help"
    done = subprocess.run(["bash", "-c", script], cwd=gone, capture_output=True, text=True)
    assert mistake(done).endswith("go to one that exists, with cd, and try again")
    assert run_python(str(ROOT / "launch" / "plan.py"), "--help", cwd=tmp_path).returncode == 0


def test_what_the_doctor_finds_is_gone_when_it_is_done(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    problems: list[str] = []
    assert doctor._measure_disk(tmp_path / "file" / "x", problems) == (0.0, 0)
    assert problems[0].endswith("give another --folder or --workdir")
    assert min(doctor._measure_disk(tmp_path, problems)) > 0 and len(problems) == 1

    def problem() -> str:
        return "\n".join(doctor._problems_of_the_environment())

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert problem().endswith("set XDG_CACHE_HOME to a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert problem() == ""
    script = "from tale_jax.planning import doctor; print(*doctor._problems_of_the_environment())"
    told = run_python("-c", script, PYTHONIOENCODING="ascii", LC_ALL="C", XDG_CACHE_HOME=str(tmp_path)).stdout
    advised = re.search(r"set (LC_ALL)=(\S+) and unset PYTHONIOENCODING", told)
    assert advised, told
    clean = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": "", advised[1]: advised[2]}
    assert run_python("-c", script, **clean).stdout == "\n"


# Paths.


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may enter: those of `tmp_path` are of one user only."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextlib.contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Permissions do not hold for root."""
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)


def test_a_path_that_is_corrected_as_told_can_be_used(folder):
    (folder / "file").touch()
    (folder / "link").symlink_to("target")
    for name, kind, told, corrected in (
        ("file", "folder", "it is a file; give the folder", "."),
        ("", "file", "it is a folder; give the path of a file", "file"),
        ("fil", "file", "does not exist; check its path", "file"),
        ("file/x", "file to write", "give another path", "x"),
        ("link", "folder to write", "it is a link to nothing", "target"),
        ("link/x", "folder to write", "is no folder; give another path", "y/x"),
        ("\udcff", "folder to write", "must have a name in UTF-8", "utf8"),
        ("x" * 300, "folder to write", "give a shorter name", "x" * 100),
    ):
        assert told in fault_of(folder / name, kind), name
        assert fault_of(folder / corrected, kind) == ""


def test_the_path_of_a_flag_is_corrected_as_told(folder, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    parser = importlib.import_module("command_line").PathParser("workdir", "folder")
    (folder / "file").touch()
    with pytest.raises(ValueError, match=r"--workdir=.*/file must be a folder, and it is a file; give the folder"):
        parser.check(parser.parse(str(folder / "file")))
    parser.check(parser.parse(str(folder)))


def test_results_that_could_not_be_written_are_written_elsewhere(folder):
    command = f"'{sys.executable}' launch/plan.py --help"
    done = subprocess.run(["bash", "-c", f"{command} > /dev/full"], cwd=ROOT, capture_output=True, text=True)
    assert mistake(done) == "error: standard output: No space left on device"
    done = subprocess.run(["bash", "-c", f"{command} > {folder}/out"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--config" in (folder / "out").read_text()


def test_a_path_whose_permissions_are_changed_as_told_can_be_used(folder):
    (folder / "locked").mkdir()
    (folder / "secret").touch()
    for name, kind, made in (
        ("secret", "file", "secret"),
        ("locked", "folder to write", "locked"),
        ("locked/new", "file to write", "locked"),
    ):
        os.chmod(folder / made, 0o555 if made == "locked" else 0o200)
        with as_ordinary_user():
            fault = fault_of(folder / name, kind)
        assert "may not be" in fault and fault.endswith("or chmod it"), name
        os.chmod(folder / made, 0o777)
        with as_ordinary_user():
            assert fault_of(folder / name, kind) == ""


def test_a_home_that_is_set_or_written_out_is_found(folder, monkeypatch):
    for wrong, told, right in (("", "write its path", "x"), ("a\0b", "must not hold a NUL", "ab")):
        with pytest.raises(ValueError, match=told):
            expanded(wrong, "--out")
        assert expanded(right, "--out") == Path(right)
    with pytest.raises(ValueError, match="there is no user nobody-of-this-name") as caught:
        expanded("~nobody-of-this-name/x", "--out")
    told = str(caught.value).partition("write it out, or as ")[2]
    assert expanded(told, "--out") == Path("~nobody-of-this-name/x")

    def no_user(_: object) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", no_user)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert machine.cache_fault() == "HOME is not set, and this user has no home"
    with pytest.raises(ValueError, match="HOME is not set"):
        expanded("~/x", "--out")
    monkeypatch.setenv("HOME", str(folder))
    assert expanded("~/x", "--out") == folder / "x" and machine.cache_fault() == ""
