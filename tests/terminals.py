"""A program in a terminal of a given size, and what stands on its screen: a small emulator of what we send."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from helpers import ROOT

ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\].*?(\x07|\x1b\\)|.)", re.DOTALL)


class Screen:
    """Lines as a terminal without reflow shows them; what is no \\r, \\n, tab or erasing of a line is `unknown`."""

    def __init__(self, columns: int):
        self.columns, self.lines, self.column = columns, [""], 0
        self.unknown: list[str] = []
        self.frames: list[str] = []  # each state of the line at the bottom, before it was drawn anew

    def feed(self, text: str) -> "Screen":
        position = 0
        while position < len(text):
            character = text[position]
            if character == "\x1b":
                match = ESCAPE.match(text, position)
                sequence = match[0] if match else "\x1b"
                position += len(sequence)
                if sequence == "\x1b[K":
                    self.lines[-1] = self.lines[-1][: self.column]
                else:
                    self.unknown.append(sequence)
                continue
            position += 1
            if character == "\r":
                if self.column and text[position : position + 1] != "\n":
                    self.frames.append(self.lines[-1])
                self.column = 0
            elif character == "\n":
                self.lines.append("")
                self.column = 0
            elif (character < " " and character != "\t") or character == "\x7f":
                self.unknown.append(character)
            else:
                if self.column >= self.columns:
                    self.lines.append("")
                    self.column = 0
                line = self.lines[-1].ljust(self.column)
                self.lines[-1] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1
        return self


class Ended:
    """How a program in a terminal ended: its exit code, and all that it wrote."""

    def __init__(self, returncode: int, output: str, columns: int):
        self.returncode, self.output = returncode, output
        self.screen = Screen(columns).feed(output)


def run_in_terminal(
    command: Sequence[str],
    columns: int = 80,
    rows: int = 24,
    env: Mapping[str, str | None] | None = None,
    cwd: Path = ROOT,
    during: Callable[[int, str], None] = lambda terminal, output: None,
    timeout: float = 300.0,
) -> Ended:
    """Runs a command with a terminal as stdin, stdout and stderr.

    `env` is added to the environment; None removes a variable. `during` is called with the terminal and all output so
    far whenever there is more.
    """
    terminal, end_of_program = pty.openpty()
    resize(terminal, columns, rows)
    values = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"}
    for name, value in (env or {}).items():
        values.pop(name, None)
        if value is not None:
            values[name] = value
    streams = {"stdin": end_of_program, "stdout": end_of_program, "stderr": end_of_program}
    output, end = b"", time.monotonic() + timeout
    with subprocess.Popen(command, cwd=cwd, env=values, start_new_session=True, **streams) as process:
        os.close(end_of_program)
        while time.monotonic() < end:
            if not select.select([terminal], [], [], 1.0)[0]:
                continue
            try:
                block = os.read(terminal, 1 << 16)
            except OSError:  # the program has ended
                break
            output += block
            during(terminal, output.decode(errors="replace"))
        else:
            process.kill()
    os.close(terminal)
    return Ended(process.returncode, output.decode(errors="replace"), columns)


def resize(terminal: int, columns: int, rows: int = 24) -> None:
    """Gives a terminal another size."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def python(code: str) -> list[str]:
    """The command that runs `code` with the package on its path."""
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
