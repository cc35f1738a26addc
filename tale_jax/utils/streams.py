r"""Standard streams that never end a run, and text that cannot steer a terminal.

    mend_streams()                    # once, when a script starts
    say("the model: experiments/a")   # a result, on stdout
    notice("runs on the CPU")         # one line on stderr
    printable("\x1b[2J")              # "\\x1b[2J": what a terminal would obey is shown as text

Afterwards every stream exists, whatever the shell did (`>&-`); characters that its encoding lacks are written in ASCII;
and what cannot be written to stderr (a full disk, a reader that went away) is dropped. Errors of stdout, where results
go, are raised: `launch/cli.py` makes one line of them.
"""

import codecs
import contextlib
import io
import os
import re
import select
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import rich.console

# Control characters but line end and tab, lone surrogates, and marks that turn the direction of text around.
STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LOOKALIKES = {
    **dict.fromkeys("‐‑‒–—−─━", "-"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”", '"'),
    "…": "...",
    "×": "x",
    "±": "+-",
    "→": "->",
    "\xa0": " ",
}
ERRORS = "tale_jax_lookalikes"  # name of the error handler below
MAX_WIDTH = 1000  # columns of a table in a file or pipe
MAX_WAIT = 2.0  # seconds for a reader that is slow, of a stream that does not block

# Called before anything is written to a terminal by way of sys.stdout and sys.stderr: whoever draws there clears it.
before_output: list[Callable[[str], None]] = []


def printable(text: object) -> str:
    r"""The text with what would steer a terminal written out, as \x1b or \u202e; line ends and tabs stay."""
    return STEERING.sub(lambda match: escaped(match[0]), str(text))


def escaped(character: str) -> str:
    r"""One character as \x1b, \n or \u202e; a byte of a file name that is no UTF-8 as \xff."""
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def say(text: object, end: str = "\n") -> None:
    """Writes a result for people to stdout: on a terminal as `printable` text, into files and pipes as it is."""
    print(printable(text) if is_terminal(sys.stdout) else text, end=end, flush=True)


def notice(text: object) -> None:
    """One line on stderr about something that was decided without asking; never the reason that a run ends."""
    write_line(f"note: {' '.join(printable(text).split())}")


def table_console(quiet: bool = False) -> "rich.console.Console":
    """Where tables are printed: as wide as the terminal at stdout, as wide as they like in files and pipes."""
    import rich.console

    return rich.console.Console(quiet=quiet, highlight=False, width=None if is_terminal(sys.stdout) else MAX_WIDTH)


def write_line(line: str) -> None:
    """Writes a line to stderr, where that is possible."""
    with contextlib.suppress(OSError, ValueError):  # closed, or a reader that went away
        print(line, file=sys.stderr, flush=True)


def is_terminal(stream: object) -> bool:
    """Whether a stream, which may be None or closed, is a terminal."""
    try:
        return bool(stream and stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False


def mend_streams() -> None:
    """Makes stdin, stdout and stderr what the module says. Scripts call it before anything is written."""
    codecs.register_error(ERRORS, _lookalike)
    for number in (0, 1, 2):
        _open_if_closed(number)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (it stays open)
    sys.stdout = _mended(sys.stdout, 1)
    sys.stderr = _mended(sys.stderr, 2)


def _lookalike(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return "".join(LOOKALIKES.get(c) or escaped(c) for c in characters), error.end


def _open_if_closed(number: int) -> None:
    """Puts /dev/null where a standard stream was closed: the next file that is opened would get its number."""
    with contextlib.suppress(OSError):
        os.fstat(number)
        return
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, number)
        if null != number:
            os.close(null)


def _mended(stream: TextIO | None, number: int) -> io.TextIOWrapper:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stream.flush()  # type: ignore[union-attr]
    raw = _Descriptor(number, required=number == 1)
    buffer = io.BufferedWriter(raw) if number == 1 and not raw.isatty() else raw
    return _Stream(buffer, encoding, ERRORS, line_buffering=True, write_through=buffer is raw)  # type: ignore[arg-type]


class _Stream(io.TextIOWrapper):
    """A text stream that tells `before_output` what will be written to a terminal."""

    def write(self, text: str, /) -> int:
        if before_output and text and self.isatty():
            for call in before_output:
                call(text)
        return super().write(text)


class _Descriptor(io.RawIOBase):
    """A file descriptor that is written to whole; where it is not `required`, what cannot be written is dropped."""

    def __init__(self, number: int, required: bool):
        self._number, self._required = number, required

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        block = memoryview(data).cast("B")  # type: ignore[arg-type]
        done = 0
        while done < len(block):
            try:
                done += os.write(self._number, block[done:])
            except BlockingIOError:  # another program made the terminal or pipe so
                if not select.select([], [self._number], [], MAX_WAIT)[1] and not self._required:
                    break
            except OSError as error:
                if self._required:
                    raise OSError(error.errno, error.strerror, "standard output") from None
                break
        return len(block)
