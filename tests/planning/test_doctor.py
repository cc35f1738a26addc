"""The doctor survives what is broken, says what to do, and is right about this machine."""

import json

import fake_plugins
import jax
import pytest

from tale_jax.hardware import machine
from tale_jax.planning import doctor
from tale_jax.planning.numerics import DTYPES, DtypeCheck
from tale_jax.utils.progress import Progress


def examine(folder):
    """What `doctor.py --json` prints, with what is installed in `folder`."""
    done = fake_plugins.run_python(folder, "launch/doctor.py", f"--folder={folder}", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        pytest.param(fake_plugins.RAISES, "jax-mps 0.11.1 does not start", marks=pytest.mark.slow),
        (fake_plugins.ABORTS, "signal 6"),
    ],
    ids=["raises", "aborts"],
)
def test_a_broken_plugin_is_a_problem_with_advice(tmp_path, source, words):
    fake_plugins.install(tmp_path, "jax-mps", source)
    found = examine(tmp_path)
    assert found["plugins"] == {"jax-mps": "0.11.1"}
    assert any(words in problem for problem in found["problems"]), found["problems"]
    assert any("pip uninstall jax-mps" in line for line in found["advice"])
    assert ("error" in found["computes"]) == (source == fake_plugins.ABORTS)  # it takes the CPU with it


@pytest.mark.slow
def test_this_machine_is_described(tmp_path):
    found = examine(tmp_path)
    assert found["machine"]["memory_bytes"] == machine.total_memory() > 0
    assert found["versions"]["jax"] == jax.__version__
    assert not found["problems"]
    computes = found["computes"]
    assert computes["platform"] == "cpu"
    assert [check["dtype"] for check in computes["dtypes"]] == list(DTYPES)
    assert computes["dtypes"][0]["correct"]
    assert computes["precision"] in computes["matmul_flops"]
    assert all(rate > 0 for rate in computes["matmul_flops"].values())


COMPUTES = {
    "platform": "metal",
    "device": "M2",
    "memory_bytes": int(5e9),
    "memory_bytes_per_second": 9e10,
    "dtypes": [vars(DtypeCheck("bfloat16", False, "the check ended with signal 6: abort"))],
    "matmul_flops": {},
    "precision": "float32",
    "precision_reason": "no dtype is correct",
    "note": "",
    "dtypes_checked_time": 1.0,
}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """`doctor.examine` without other processes: what each platform answers, by its name."""
    answers = {"auto": COMPUTES, "cpu": COMPUTES}
    monkeypatch.setattr(doctor, "_measure_in_subprocess", lambda name, progress: answers[name])
    monkeypatch.setattr(doctor, "_problems_of_the_environment", list)
    monkeypatch.setattr(machine, "disk_speed", lambda folder: 1e9)
    return answers


@pytest.mark.parametrize(
    ("auto", "cpu", "problems", "advice"),
    [
        (COMPUTES, COMPUTES, [], "precision=auto will take float32 on metal"),
        (
            {"error": "signal 6: abort"},
            COMPUTES,
            ["platform auto: signal 6: abort"],
            "precision=auto will take float32",
        ),
        ({"error": "one"}, {"error": "two"}, ["platform auto: one", "on the CPU either: two"], "make clean"),
        (COMPUTES | {"precision": ""}, COMPUTES, [], "no dtype is correct"),
        (COMPUTES | {"note": "falls back to the CPU"}, COMPUTES, [], "falls back to the CPU"),
    ],
)
def test_problems_are_told_with_what_to_do(quick, monkeypatch, tmp_path, auto, cpu, problems, advice):
    quick |= {"auto": auto, "cpu": cpu}
    monkeypatch.setattr(machine, "version", lambda name: "0.11.1" if name == "jax-mps" else "")
    monkeypatch.setattr(machine, "start_failure", lambda plugin: "")
    found = doctor.examine(tmp_path)
    assert len(found["problems"]) == len(problems)
    assert all(words in line for words, line in zip(problems, found["problems"], strict=True))
    assert any(advice in line for line in found["advice"])
    assert json.loads(json.dumps(found)) == found


def test_two_plugins_and_a_mac_without_one_are_told(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "is_apple_silicon", lambda: True)
    monkeypatch.setattr(machine, "macos_version", lambda: (15, 0))
    monkeypatch.setattr(machine.sys, "version_info", (3, 13, 0))  # jax-mps needs 3.12
    assert any("the GPU is not used: no plugin is installed" in line for line in doctor.examine(tmp_path)["advice"])
    monkeypatch.setattr(machine, "version", lambda name: "1" if name in ("jax-mps", "jax-metal") else "")
    assert any("installed and clash" in line for line in doctor.examine(tmp_path)["problems"])


@pytest.mark.parametrize(("memory", "little"), [(5e9, True), (64e9, False), (0, False)])
def test_little_memory_is_advised_on(memory, little):
    advice = doctor._advice(COMPUTES | {"memory_bytes": int(memory)})
    assert any("configs/m2_air.py" in line for line in advice) == little


def test_tables_show_what_was_found(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = doctor.examine(tmp_path) | {"problems": ["a problem"]}
    doctor.print_findings(found)
    out = capsys.readouterr().out
    assert (
        "and kept; matmul was" in out
        and "signal 6" in out
        and "a problem" in out
        and "configs/m2_air.py" in out
        and "metal: M2" in out
    )
    doctor.print_findings(found | {"computes": {"error": "signal 6: abort"}, "problems": []})
    out = capsys.readouterr().out
    assert "metal: M2" not in out and "Problems" not in out


def test_the_other_process_says_why_it_cannot(monkeypatch):
    """No Metal plugin is installed where the tests run."""
    monkeypatch.setattr(doctor, "TIMEOUT", 600)
    with Progress("doctor", show=False) as progress:
        found = doctor._measure_in_subprocess("metal", progress)
    assert found["error"].startswith("exit code 1: backend.platform=metal is not possible here")
