"""Other processes: what they print comes back, and why they failed, whatever the reason, in one line."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import is_alive

from tale_jax.utils import subprocesses
from tale_jax.utils.subprocesses import run, run_code, run_module


def test_the_last_line_of_stdout_is_the_result():
    result = run_code("import sys; print('hello'); print('warns', file=sys.stderr); print('{\"a\": [1]}')")
    assert result.reason == ""
    assert result.stdout == 'hello\n{"a": [1]}\n'
    assert result.json() == {"a": [1]}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; print('first\\nlast\\t line', file=sys.stderr); sys.exit(3)", "exit code 3: last line"),
        ("import sys; sys.exit(7)", "exit code 7: nothing on stderr"),
        ("raise ValueError('two\\nlines')", "exit code 1: lines"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9: nothing on stderr"),
        ("import sys; sys.stderr.buffer.write(b'\\xff'); sys.exit(1)", "exit code 1: \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_a_failure_is_one_line(code, reason):
    result = run_code(f"print('before', flush=True)\n{code}")
    assert (result.reason, result.stdout) == (reason, "before\n")


def test_a_long_reason_is_shortened():
    reason = run_code("import sys; sys.exit('x' * 10_000)").reason
    assert len(reason) == len("exit code 1: ") + subprocesses.MAX_REASON_CHARS


def test_a_process_that_hangs_is_ended(tmp_path):
    code = f"import pathlib, time; time.sleep(1.5); pathlib.Path({str(tmp_path / 'alive')!r}).touch(); time.sleep(60)"
    result = run_code(code, timeout=0.5)
    assert result.reason == "no result within 0.5 s"
    assert run_code("import time; time.sleep(2)").reason == ""
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_this_process_ends_the_other_one(tmp_path, number):
    file = tmp_path / "number"
    other = f"import os, pathlib, time; pathlib.Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    command = [sys.executable, "-c", f"from tale_jax.utils.subprocesses import run_code; run_code({other!r})"]
    with subprocess.Popen(command, cwd=subprocesses.PACKAGE_ROOT) as process:
        while not (file.is_file() and file.read_text()):
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(30) == -number
    deadline = time.monotonic() + 30
    while is_alive(int(file.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int(file.read_text()))


def test_a_missing_program_is_a_reason():
    assert run(["no-such-program", "x"]).reason == "no-such-program: No such file or directory"


def test_stdin_and_environment_reach_the_process():
    code = "import os, sys; print(sys.stdin.read() + os.environ['NEW'] + os.environ['PATH'])"
    assert (
        run([sys.executable, "-c", code], stdin="in ", env={"NEW": "new "}).stdout == f"in new {os.environ['PATH']}\n"
    )


def test_a_module_of_this_package_is_found_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("import sys, tale_jax; print(tale_jax.__file__, *sys.argv[1:])\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # what the user set counts as well
    result = run_module("neighbour", "one", "two")
    assert result.stdout.split() == [str(subprocesses.PACKAGE_ROOT / "tale_jax" / "__init__.py"), "one", "two"]
    monkeypatch.delenv("PYTHONPATH")
    assert run_module("tale_jax.data.tales.grammar", "--count=1").stdout.endswith("nats]\n\n")
