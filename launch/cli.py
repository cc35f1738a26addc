"""How every script starts: by a Python that has what it needs. What scripts use of `command_line.py` comes from here.

    sys.path.insert(0, str(Path(__file__).resolve().parent))  # the first entry already, but under `python -P`
    from cli import define_path, run

    if __name__ == "__main__":
        run(main)

This file and the scripts are written so that an old Python can read them, and say in one line what is missing. Where
`make env` has made .venv, the script is started again with its Python.
"""

import contextlib
import os
import sys
import time
from importlib.util import find_spec

__all__ = ["START_TIME", "config_words", "define_path", "overrides", "run", "use_saved_config"]

START_TIME = time.monotonic()
ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
MIN_PYTHON = (3, 11)
LIBRARIES = ("absl", "ml_collections", "numpy", "jax", "flax", "optax", "orbax", "grain")
STARTED_AGAIN = "TALE_JAX_STARTED_AGAIN"  # set for the Python of .venv, which must not start itself once more


def missing():
    """What this Python lacks, in words; "" when it has all that a script needs."""
    if sys.version_info < MIN_PYTHON:
        return "Python %d.%d or newer" % MIN_PYTHON  # noqa: UP031
    return ", ".join([name for name in LIBRARIES if find_spec(name) is None])


def start_with_right_python():
    """Returns when this Python will do; else starts the script with that of .venv, or ends with one line."""
    lacking, was_started_again = missing(), os.environ.pop(STARTED_AGAIN, "")
    if not lacking:
        return
    python = os.path.join(ROOT, ".venv", "bin", "python")
    if not was_started_again and os.path.exists(python):
        os.environ[STARTED_AGAIN] = "1"
        with contextlib.suppress(OSError):
            os.execv(python, [python] + sys.argv)  # noqa: RUF005
    version = "%d.%d" % sys.version_info[:2]  # noqa: UP031
    here = "." if os.path.realpath(os.curdir) == ROOT else ROOT
    line = (
        "error: this is Python {} ({}), and it lacks {}; run `make env` in {}, then `source {}/.venv/bin/activate`\n"
    ).format(version, sys.executable or "python", lacking, ROOT, here)
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(line)
    sys.exit(2)


start_with_right_python()

sys.path.insert(1, ROOT)  # recipes import each other, as `from configs import base`

from command_line import config_words, define_path, overrides, run, use_saved_config  # noqa: E402
