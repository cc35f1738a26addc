"""Other processes that answer: what may abort or hang happens there, and here its reason is one line.

answer = run_module("tale_jax.planning.numerics", "cpu", "bfloat16", timeout=300)
found = answer.json() if not answer.reason else {"error": answer.reason}
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


@dataclasses.dataclass(frozen=True)
class Answer:
    """How a process ended.

    Attributes:
      stdout: all of it.
      reason: why it failed, in one line; "" when it ended with exit code 0.
    """

    stdout: str
    reason: str

    def json(self) -> Any:
        """The JSON value in the last line of stdout."""
        return json.loads(self.stdout.strip().splitlines()[-1])


def run(
    command: Sequence[str], *, stdin: str = "", env: Mapping[str, str] | None = None, timeout: float | None = None
) -> Answer:
    """Runs a command to its end, `timeout` seconds at most. `env` adds to the environment. Never raises."""
    try:
        done = subprocess.run(
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
        return Answer("", f"no answer within {timeout:.0f} s")
    except OSError as error:
        return Answer("", f"{command[0]}: {error.strerror or error}")
    if done.returncode == 0:
        return Answer(done.stdout, "")
    said = " ".join((done.stderr.strip().splitlines() or ["it said nothing"])[-1].split())[:300]
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return Answer(done.stdout, f"{how}: {said}")


def run_module(module: str, *args: str, stdin: str = "", timeout: float | None = None) -> Answer:
    """Runs `python -m module args`, with the Python and the package of this process."""
    path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))
    return run([sys.executable, "-m", module, *args], stdin=stdin, env={"PYTHONPATH": path}, timeout=timeout)


def run_code(code: str, *, env: Mapping[str, str] | None = None, timeout: float | None = None) -> Answer:
    """Runs `python -c code`, with the Python of this process."""
    return run([sys.executable, "-c", code], env=env, timeout=timeout)
