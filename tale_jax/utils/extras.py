"""Libraries that only some settings need, and the one command that installs them into the Python that runs this."""

import importlib
import sys
from pathlib import Path

from tale_jax.utils.paths import quoted

ROOT = Path(__file__).resolve().parents[2]


def has_library(name: str) -> bool:
    """Whether a module can be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def missing_extra(what: str, library: str, extra: str) -> str:
    """Why something cannot be done without an extra of pyproject.toml, and the command that installs it."""
    return f"{what} needs {library}, which is not installed; {install_command(extra)}"


def install_command(extra: str) -> str:
    """The command that adds an extra to the environment of this Python.

    One that `make env` made is made again with what it had, at the pinned versions; for any other it is pip.
    """
    prefix = Path(sys.prefix)
    try:
        stamp = (prefix / ".stamp").read_text()
    except (OSError, ValueError):
        stamp = ""
    had = next((line.partition("=")[2] for line in stamp.splitlines() if line.startswith("extras=")), "")
    if not had:
        return f"{quoted(sys.executable)} -m pip install -e {quoted(f'{ROOT}[{extra}]')}"
    extras = ",".join(dict.fromkeys([*had.split(","), extra]))
    venv = "" if prefix == ROOT / ".venv" else f" VENV={quoted(prefix)}"
    return f"make -C {quoted(ROOT)} env{venv} EXTRAS={extras}"
