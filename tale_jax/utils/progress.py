"""Progress of anything that takes long: preparing, training, evaluating, sampling.

    with Progress("train", total=1000, unit="steps", log=workdir / "log.txt") as progress:
        for step in range(1, 1001):
            progress.advance()
            progress.set_fields({"loss": 3.2, "learning_rate": 1e-3, "tokens_per_second": 9100})

On a terminal this is one bar that stays at the bottom; in a log, a line every few seconds without control characters:

    train 120/1,000 steps (12%)  loss 3.214  lr 1.9e-03  9,100 tokens/s  ETA 1:36
"""

import contextlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import rich.console
import rich.progress

from tale_jax.utils.format import format_clock

BAR_WIDTH = 14  # characters

# Fields of a record that are shown, and how. A narrow terminal leaves out the last of them.
FIELD_FORMATS: dict[str, Callable[[float], str]] = {
    "loss": lambda v: f"loss {v:.3f}",
    "nats_per_token": lambda v: f"{v:.3f} nats/token",
    "tokens_per_second": lambda v: f"{v:,.0f} tokens/s",
    "learning_rate": lambda v: f"lr {v:.1e}",
    "grad_norm": lambda v: f"grad {v:.2g}",
    "peak_share": lambda v: f"{v:.0%} of peak",
}


class Progress:
    """A bar on a terminal, a plain line every few seconds elsewhere; both on stderr, which leaves stdout to results.

    A context manager. `advance` is cheap enough to be called for every step, document or token.

    Args:
      title: what is going on, in a word or two.
      total: how much there is to do, in `unit`; 0 if unknown.
      unit: "steps", "windows", "tokens", "bytes" (shown as MB), …
      start: how much was done before, by a run that is resumed.
      log: file that the plain lines are appended to, with the time, whatever stderr is.
      show: False shows nothing; the log is still written.
      every_seconds: minimum time between two plain lines.
      clock: seconds, from which rate and time left follow; None: `time.monotonic`.
    """

    def __init__(
        self,
        title: str,
        *,
        total: int = 0,
        unit: str = "steps",
        start: int = 0,
        log: Path | None = None,
        show: bool = True,
        every_seconds: float | int = 5.0,
        clock: Callable[[], float] | None = None,
    ):
        self._title, self._total, self._unit, self._done = title, total, unit, start
        self._log_path, self._show, self._every_seconds = log, show, every_seconds
        self._clock = clock or (lambda: time.monotonic())
        self._parent: Progress | None = None
        self._log: TextIO | None = None
        self._bar: rich.progress.Progress | None = None
        self._fields: Mapping[str, Any] = {}
        self._rate_samples: deque[tuple[float, int]] = deque(maxlen=120)  # newest (time, done), at least 1 s apart
        self._last_draw_time = self._last_line_time = -math.inf  # of the bar, and of the plain lines
        self._unlogged = False  # something happened since the last plain line

    def __enter__(self) -> "Progress":
        if self._log_path is not None:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = self._log_path.open("a", encoding="utf-8")
        if self._parent is not None:
            self._bar = self._parent._bar
        elif self._show and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = rich.progress.Progress(
                rich.progress.SpinnerColumn(),
                rich.progress.TextColumn("{task.description}", style="bold", markup=False),
                rich.progress.BarColumn(bar_width=BAR_WIDTH),
                rich.progress.TextColumn("{task.fields[text]}", markup=False),
                console=rich.console.Console(stderr=True),
                redirect_stdout=sys.stdout.isatty(),  # never results that go to a file
            )
            self._bar.start()
        if self._bar is not None:
            self._task = self._bar.add_task(self._title, total=self._total or None, completed=self._done, text="")
        if self._parent is not None:  # a part that is soon over writes no line
            self._last_line_time = self._clock()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None and self._unlogged:
            self._refresh(self._clock(), last=self._parent is None)
        if self._bar is not None and self._parent is None:
            self._bar.stop()
        elif self._bar is not None:
            self._bar.remove_task(self._task)
        if self._log is not None and self._parent is None:
            self._log.close()

    def part(self, title: str, *, total: int = 0, unit: str = "windows") -> "Progress":
        """A second bar below this one, until its `with` ends: for an evaluation in the middle of training."""
        part = Progress(
            title, total=total, unit=unit, show=self._show, every_seconds=self._every_seconds, clock=self._clock
        )
        part._parent, part._log = self, self._log
        return part

    def advance(self, count: int = 1) -> None:
        """Adds `count`, in the unit, to what is done."""
        self._done += count
        self._unlogged = True
        now = self._clock()
        if not self._rate_samples or now - self._rate_samples[-1][0] >= 1.0:
            self._rate_samples.append((now, self._done))  # the first one after the first step, which compiles
        if now - self._last_draw_time >= 0.1:
            self._refresh(now)

    def set_fields(self, record: Mapping[str, Any]) -> None:
        """Fields of a record to show beside the count from now on: see `FIELD_FORMATS`."""
        self._fields = dict(record)
        self._unlogged = True
        self._refresh(self._clock())

    def print(self, text: str) -> None:
        """Prints text above the bar and into the log. Control characters, which models produce, are replaced."""
        text = printable(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._show:
            print(text, file=sys.stderr, flush=True)
        self._write_log(text)

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()

    def _refresh(self, now: float, last: bool = False) -> None:
        self._last_draw_time = now
        if self._bar is not None:
            width = self._bar.console.width - BAR_WIDTH - len(self._title) - 5  # spinner and gaps
            self._bar.update(self._task, completed=self._done, text=self._text(now, width))
        if last or now - self._last_line_time >= self._every_seconds:
            self._last_line_time, self._unlogged, text = now, False, self._text(now)
            if self._bar is None and self._show:
                print(f"{self._title} {text}", file=sys.stderr, flush=True)
            self._write_log(f"{self._title} {text}")

    def _text(self, now: float, width: float | int = math.inf) -> str:
        """Count, fields and time left, with as many of the fields as fit into `width` characters."""
        scale, digits, unit = (1e6, 1, "MB") if self._unit == "bytes" else (1, 0, self._unit)
        count, left = f"{self._done / scale:,.{digits}f}", ""
        if self._total:
            count += f"/{self._total / scale:,.{digits}f} {unit} ({self._done / self._total:.0%})"
        else:
            count += f" {unit}"
        present = {name: value for name, value in self._fields.items() if value is not None}
        fields = [format_field(present[name]) for name, format_field in FIELD_FORMATS.items() if name in present]
        sample_time, sample_done = self._rate_samples[0] if self._rate_samples else (now, self._done)
        if now > sample_time and (rate := (self._done - sample_done) / (now - sample_time)):
            if "tokens_per_second" not in self._fields:
                fields.append(f"{rate / scale:,.3g} {unit}/s")
            if self._done < self._total:
                left = f"ETA {format_clock((self._total - self._done) / rate)}"
        while len(text := "  ".join(filter(None, [count, *fields, left]))) > width and fields:
            fields.pop()
        return text


def notice(text: str) -> None:
    """One line on stderr about something that was decided without asking; never the reason that a run ends."""
    with contextlib.suppress(OSError, ValueError):  # closed, or a reader that went away
        print(f"note: {printable(text)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text with control characters, which models and file names may hold, replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
