"""Other processes, run to their end: what may abort or hang does so there, and its reason comes back as one line.

result = run_module("tale_jax.planning.numerics", "cpu", "bfloat16", timeout=300)
check = result.json() if not result.reason else {"error": result.reason}
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
    """

    stdout: str
    reason: str

    def json(self) -> Any:
        """The JSON value in the last line of stdout."""
        return json.loads(self.stdout.strip().splitlines()[-1])


def run(
    command: Sequence[str],
    *,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    timeout: float | int | None = None,
) -> ProcessResult:
    """Runs a command to its end, for at most `timeout` seconds. A failure is a result, never an exception.

    `env` is added to the environment of this process.
    """
    try:
        process = subprocess.run(
            command,
            input=stdin,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ProcessResult("", f"no result within {timeout:g} s")
    except OSError as error:
        return ProcessResult("", f"{command[0]}: {error.strerror or error}")
    code = process.returncode
    if code == 0:
        return ProcessResult(process.stdout, "")
    last_line = (process.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
    ending = f"signal {-code}" if code < 0 else f"exit code {code}"
    return ProcessResult(process.stdout, f"{ending}: {' '.join(last_line.split())[:MAX_REASON_CHARS]}")


def run_module(module: str, *args: str, stdin: str = "", timeout: float | int | None = None) -> ProcessResult:
    """Runs `python -m module args`, with the Python and the package of this process."""
    path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))
    return run([sys.executable, "-m", module, *args], stdin=stdin, env={"PYTHONPATH": path}, timeout=timeout)


def run_code(code: str, *, env: Mapping[str, str] | None = None, timeout: float | int | None = None) -> ProcessResult:
    """Runs `python -c code`, with the Python of this process."""
    return run([sys.executable, "-c", code], env=env, timeout=timeout)
