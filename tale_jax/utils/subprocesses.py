"""Other processes, run to their end: what may abort or hang does so there, and its reason comes back as one line.

result = run_module("tale_jax.planning.numerics", "cpu", "bfloat16", timeout=300)
check = result.json() if not result.reason else {"error": result.reason}
"""

import atexit
import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGE_ROOT = Path(__file__).resolve().parents[2]  # where the other process finds this very package
MAX_REASON_CHARS = 300


@dataclasses.dataclass(frozen=True)
class ProcessResult:
    """How a process ended.

    Attributes:
      stdout: all of it.
      reason: why the process failed, in one line; "" when it ended with exit code 0.
      stderr: all of it.
    """

    stdout: str
    reason: str
    stderr: str = ""

    def json(self) -> Any:
        """The JSON value in the last line of stdout."""
        return json.loads(self.stdout.strip().splitlines()[-1])


def run(
    command: Sequence[str],
    *,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    timeout: float | int | None = None,
    on_stderr: Callable[[str], None] | None = None,
) -> ProcessResult:
    """Runs a command to its end, for at most `timeout` seconds. A failure is a result, never an exception.

    A SIGTERM or SIGHUP that ends this process ends the other one too. `env` is added to the environment of this
    process. `on_stderr` gets each line of stderr when it comes.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | (env or {}),
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, ValueError) as error:
        return ProcessResult("", f"{command[0]}: {getattr(error, 'strerror', '') or error}")
    with process, _ended_with_this_process(process):
        lines: list[str] = []
        reader = threading.Thread(target=_read_lines, args=(process.stderr, lines, on_stderr), daemon=True)
        reader.start()
        process.stderr = None  # it is read by the thread
        try:
            stdout, _ = process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return ProcessResult("", f"no result within {timeout:g} s", "".join(lines))
        except BaseException:
            process.kill()
            raise
        reader.join()
    code, stderr = process.returncode, "".join(lines)
    if code == 0:
        return ProcessResult(stdout, "", stderr)
    last_line = (stderr.strip().splitlines() or ["nothing on stderr"])[-1]
    ending = f"signal {-code}" if code < 0 else f"exit code {code}"
    return ProcessResult(stdout, f"{ending}: {' '.join(last_line.split())[:MAX_REASON_CHARS]}", stderr)


@contextlib.contextmanager
def _ended_with_this_process(process: subprocess.Popen[str]) -> Iterator[None]:
    """A signal that would end this process at once ends the other one first. Nothing changes where the signal is
    handled or ignored, or outside the main thread, which alone may set handlers."""

    def end(number: int, _: Any) -> None:
        process.kill()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    is_main = threading.current_thread() is threading.main_thread()
    caught = [n for n in (signal.SIGTERM, signal.SIGHUP) if is_main and signal.getsignal(n) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _read_lines(stream: Any, lines: list[str], on_line: Callable[[str], None] | None) -> None:
    with stream:
        for line in stream:
            lines.append(line)
            if on_line:
                on_line(line.rstrip("\n"))


def run_module(
    module: str,
    *args: str,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    timeout: float | int | None = None,
    on_stderr: Callable[[str], None] | None = None,
) -> ProcessResult:
    """Runs `python -m module args`, with the Python and the package of this process; `env` is added to its own."""
    command = [sys.executable, "-P", "-m", module, *args]  # -P: modules in the current folder are not meant
    return run(command, stdin=stdin, env={**_own_path(), **(env or {})}, timeout=timeout, on_stderr=on_stderr)


class LoggedProcess:
    """A command that runs beside this process; what it says is added to a file.

    `env` is added to the environment of this process, and `folder` is where it starts (None: that of this process).
    Raises OSError where it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        folder: Path | str | None = None,
    ):
        given = {"stdin": subprocess.DEVNULL, "env": os.environ | (env or {}), "cwd": folder}
        with log.open("ab") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file, **given)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None as long as it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Asks it to end."""
        self._process.terminate()

    def wait(self) -> int:
        """The exit code, when it has ended."""
        return self._process.wait()


class LineProcess:
    """A `python -m module` that answers each line of its stdin with one of stdout: started when it is first asked, and
    again after it had to be ended. Threads may share it."""

    def __init__(self, module: str):
        self._module, self._lock = module, threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)

    def ask(self, line: str, timeout: float | int) -> str:
        """The answer; "" where there is none within `timeout` seconds, or the process ended."""
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", self._module],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | _own_path() | {"PYTHONIOENCODING": "utf-8"},
                    encoding="utf-8",
                )
            assert process.stdin and process.stdout
            answer = ""
            with contextlib.suppress(OSError):
                process.stdin.write(line + "\n")
                process.stdin.flush()
                if select.select([process.stdout], [], [], timeout)[0]:
                    answer = process.stdout.readline()
            if not answer.endswith("\n"):
                self.close()
                return ""
            return answer

    def close(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError, AttributeError):
                stream.close()  # pyright: ignore[reportOptionalMemberAccess]


class Companion:
    """A `python -m module args` in a session of its own, which no signal to this process's group reaches; when this
    process ends, its stdin does."""

    def __init__(self, module: str, *args: str):
        self._process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | _own_path(),
            text=True,
            start_new_session=True,
        )

    def read_line(self, timeout: float | int) -> str:
        """The next line that it prints; "" where there is none within `timeout` seconds, or it has ended."""
        assert self._process.stdout
        ready = select.select([self._process.stdout], [], [], timeout)[0]
        return self._process.stdout.readline().strip() if ready else ""

    def write_line(self, line: str) -> None:
        """Sends a line, unless it has ended."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def close(self, timeout: float | int = 5.0) -> None:
        """Waits for its end, and brings it about after `timeout` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, AttributeError):
                stream.close()  # pyright: ignore[reportOptionalMemberAccess]


def _own_path() -> dict[str, str]:
    """The variable by which another Python finds this very package."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))}


def run_code(code: str, *, env: Mapping[str, str] | None = None, timeout: float | int | None = None) -> ProcessResult:
    """Runs `python -c code`, with the Python of this process."""
    return run([sys.executable, "-P", "-c", code], env=env, timeout=timeout)
