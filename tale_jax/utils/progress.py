r"""Progress of anything that takes long: preparing, training, evaluating, sampling.

    with Progress("train", total=1000, unit="steps", log=workdir / "log.txt") as progress:
        with progress.part("compiling the training step"):
            ...
        for step in range(1, 1001):
            progress.advance()
            progress.set_fields({"loss": 3.2, "learning_rate": 1e-3, "tokens_per_second": 9100})

On a terminal this is one line at the bottom, drawn four times a second even while nothing advances, and cut to the
width there is: the loss is the last to go. Elsewhere it is a line every few seconds without control characters:

    train 120/1,000 steps (12%)  loss 3.214  lr 1.9e-03  9,100 tokens/s  ETA 1:36

All of it is optional: a stream or a log file that cannot be written never ends a run.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tale_jax.utils import streams
from tale_jax.utils.format import format_clock, format_duration
from tale_jax.utils.streams import is_terminal, notice, printable, write_line

__all__ = ["Progress", "notice", "printable"]

BAR_WIDTH = 14  # characters
DRAW_SECONDS = 0.25  # between two drawings while nothing advances
FIRST_BEAT, LAST_BEAT = 10.0, 60.0  # seconds without a plain line until one says that something still runs
UNKNOWN_WIDTH, MIN_WIDTH = 80, 10  # columns: of a terminal that does not tell; below the other it is not believed

# Fields of a record that are shown, and how. A narrow terminal leaves out the last of them.
FIELD_FORMATS: dict[str, Callable[[float], str]] = {
    "loss": lambda v: f"loss {v:.3f}",
    "nats_per_token": lambda v: f"{v:.3f} nats/token",
    "tokens_per_second": lambda v: f"{v:,.0f} tokens/s",
    "learning_rate": lambda v: f"lr {v:.1e}",
    "grad_norm": lambda v: f"grad {v:.2g}",
    "peak_share": lambda v: f"{v:.0%} of peak",
}
# Which parts of a line stay where not all fit: the lowest first. Others follow in the order of FIELD_FORMATS.
RANKS = {"loss": 0, "nats_per_token": 0, "left": 1, "tokens_per_second": 2, "rate": 2, "bar": 3}


class Item(NamedTuple):
    """A part of a line: a lower `rank` stays longer."""

    rank: int
    text: str


class Progress:
    """A line at the bottom of a terminal, a plain line every few seconds elsewhere; on stderr, never among results.

    A context manager. `advance` is cheap enough to be called for every step, document or token.

    Args:
      title: what is going on, in a word or two.
      total: how much there is to do, in `unit`; 0 if unknown. It is never shown as exceeded.
      unit: "steps", "windows", "tokens", "bytes" (shown as MB or kB), …
      start: how much was done before, by a run that is resumed.
      log: file that the plain lines are appended to, with the time, whatever stderr is.
      show: False shows nothing; the log is still written.
      every_seconds: minimum time between two plain lines; infinite: none.
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
        self._title, self._total, self._unit = printable(title), total, unit
        self._start = self._done = start
        self._log_path, self._show, self._every_seconds = log, show, every_seconds
        self._clock = clock or (lambda: time.monotonic())
        self._parent: Progress | None = None
        self._log: TextIO | None = None
        self._live = False  # drawn on a terminal
        self._gives_way = False  # to whatever else is shown, and does not come back
        self._fields: Mapping[str, Any] = {}
        self._rate_samples: deque[tuple[float, int]] = deque(maxlen=120)  # newest (time, done), at least 1 s apart
        self._start_time = self._clock()
        self._last_draw_time = self._last_line_time = -math.inf  # of the live line, and of the plain lines
        self._beat = max(FIRST_BEAT, every_seconds)  # seconds from one plain line to one without news
        self._unlogged = False  # something happened since the last plain line

    def __enter__(self) -> "Progress":
        self._start_time = self._clock()
        self._live = self._show and is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"
        if self._parent is not None:  # a part that is soon over writes no line
            self._last_line_time = self._start_time
        if self._show:
            _BOTTOM.add(self)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        _BOTTOM.remove(self)
        moved = self._live and self._parent is None and (self._done != self._start or bool(self._fields))
        if error is None and (self._unlogged or moved):
            self._refresh(self._clock(), last=self._parent is None)
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()

    def part(self, title: str, *, total: int = 0, unit: str = "windows") -> "Progress":
        """What goes on inside this one until its `with` ends: an evaluation in the middle of training, a compilation.

        Without a total its time is shown.
        """
        part = Progress(
            title, total=total, unit=unit, show=self._show, every_seconds=self._every_seconds, clock=self._clock
        )
        part._parent = self
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

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """A `part` without a total that counts as 1 of this one when it is done."""
        with self.part(title):
            yield
        self.advance()

    def set_fields(self, record: Mapping[str, Any]) -> None:
        """Fields of a record to show beside the count from now on: see `FIELD_FORMATS`."""
        self._fields = dict(record)
        self._unlogged = True
        self._refresh(self._clock())

    def print(self, text: str) -> None:
        """Prints text above the line and into the log. Control characters, which models produce, are written out."""
        text = printable(text)
        if self._live:
            _BOTTOM.print(text)
        elif self._show:
            write_line(text)
        self._write_log(text)

    def _write_log(self, text: str) -> None:
        if self._parent is not None:
            self._parent._write_log(text)
        elif self._log_path is not None:
            try:
                if self._log is None:  # not before there is something to say: a command may be refused
                    self._log_path.parent.mkdir(parents=True, exist_ok=True)
                    self._log = self._log_path.open("a", encoding="utf-8", errors="backslashreplace")
                self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
                self._log.flush()
            except (OSError, ValueError):  # a full disk: what matters is written elsewhere
                with contextlib.suppress(OSError, ValueError):
                    if self._log is not None:
                        self._log.close()
                self._log = self._log_path = None

    def _refresh(self, now: float, last: bool = False) -> None:
        self._last_draw_time = now
        if self._live and not last:
            _BOTTOM.draw()
        if last or now - self._last_line_time >= self._every_seconds:
            self._last_line_time = now
            self._beat = max(FIRST_BEAT, self._every_seconds)
            line = f"{self._title} {self._text(now)}"
            if self._live and last:
                _BOTTOM.print(f"{self._title} {self._text(now, terminal_width() - len(self._title) - 2)}")
            elif self._show and not self._live and self._unlogged and math.isfinite(self._every_seconds):
                write_line(line)
            if self._unlogged:
                self._write_log(line)
            self._unlogged = False

    def beat(self) -> None:
        """Says that this still runs, where no line has said so for a while and there is no terminal to draw on."""
        now = self._clock()
        silent_since = max(self._last_line_time, self._start_time)
        if not self._live and now - silent_since >= self._beat and math.isfinite(self._every_seconds):
            self._last_line_time, self._beat = now, min(2 * self._beat, LAST_BEAT)
            write_line(f"{self._title} {self._text(now)}")

    def live_line(self, width: int) -> str:
        """The line for a terminal, of `width` characters at most."""
        now = self._clock()
        modern = (getattr(sys.stderr, "encoding", None) or "").lower().replace("-", "").startswith("utf")
        spinner = ("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏" if modern else "|/-\\")[int(now / DRAW_SECONDS) % (10 if modern else 4)]
        title = f"{spinner} {self._title}"
        bar = ""
        if self._total:
            filled = BAR_WIDTH * min(self._done, self._total) // self._total
            bar = ("━" if modern else "=") * filled + ("─" if modern else "-") * (BAR_WIDTH - filled)
        parent, left = self._parent, ""
        if parent and parent._total:
            longer = f"{spinner} {parent._title} {parent._counts(now)[-1]}  {self._title}"
            title = longer if len(longer) + 24 <= width else title
            left = "" if self._total else parent._time_left(now)
        text = self._text(now, width - len(title) - 1, bar)
        if left and len(title) + len(text) + len(left) + 3 <= width:
            text += f"  {left}"
        return f"{title} {text}"[: max(0, width)]

    def _text(self, now: float, width: float | int = math.inf, bar: str = "") -> str:
        """Count, fields and time left, with as many of them as fit into `width` characters."""
        scale, _, unit = self._scale()
        present = {name: value for name, value in self._fields.items() if value is not None}
        items = [Item(RANKS["bar"], bar)] if bar else []
        place = len(items)  # of the count
        for number, (name, formatted) in enumerate(FIELD_FORMATS.items()):
            if name in present:
                items.append(Item(RANKS.get(name, 4 + number), formatted(present[name])))
        sample_time, sample_done = self._rate_samples[0] if self._rate_samples else (now, self._done)
        rate = (self._done - sample_done) / (now - sample_time) if now > sample_time else 0.0
        if rate and "tokens_per_second" not in self._fields:
            items.append(Item(RANKS["rate"], f"{_three_digits(rate / scale)} {unit}/s"))
        if left := self._time_left(now):
            items.append(Item(RANKS["left"], left))
        counts = self._counts(now)
        needed = [item.text for item in items if item.rank == 0]
        count = next((text for text in counts if len("  ".join([text, *needed])) <= width), counts[-1])
        items.insert(place, Item(-1 if len("  ".join([count, *needed])) <= width or not needed else 1, count))
        kept: set[int] = set()
        for index in sorted(range(len(items)), key=lambda index: items[index].rank):
            if len("  ".join(items[i].text for i in sorted(kept | {index}))) <= width:
                kept.add(index)
        return "  ".join(items[i].text for i in sorted(kept))

    def _time_left(self, now: float) -> str:
        """ETA 1:36, at the rate since the first advance; "" while that is not known."""
        sample_time, sample_done = self._rate_samples[0] if self._rate_samples else (now, self._done)
        if now <= sample_time or self._done <= sample_done or self._done >= self._total:
            return ""
        return f"ETA {format_clock((self._total - self._done) * (now - sample_time) / (self._done - sample_done))}"

    def _scale(self) -> tuple[float, int, str]:
        """What a count is divided by, its digits, and its unit."""
        if self._unit != "bytes":
            return 1.0, 0, self._unit
        return (1e6, 1, "MB") if max(self._total, self._done) >= 1e6 else (1e3, 0, "kB")

    def _counts(self, now: float) -> list[str]:
        """How much is done, in words, the longest first; where nothing is counted, the time since the start."""
        scale, digits, unit = self._scale()
        done = min(self._done, self._total) if self._total else self._done  # a total may be an estimate
        count = f"{done / scale:,.{digits}f}"
        if self._total:
            share = f"{math.floor(100 * done / self._total)}%"
            count = f"{count}/{self._total / scale:,.{digits}f}"
            return [f"{count} {unit} ({share})", f"{count} ({share})", share]
        return [f"{count} {unit}", count] if done else [format_duration(now - self._start_time)]


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show_start(title: str) -> Progress:
    """Shows on a terminal that a script starts, and for how long, until it shows anything else. End it by its exit."""
    start = Progress(title, every_seconds=math.inf)
    start._gives_way = True
    return start.__enter__()


class _Bottom:
    """The line at the bottom of the terminal: what runs innermost, drawn by whoever advances and by a thread."""

    def __init__(self):
        self._lock = threading.RLock()
        self._shown: list[Progress] = []
        self._thread: threading.Thread | None = None
        self._is_drawn = self._is_drawing = False
        self._inside_a_line = False  # something else was written that has not ended its line
        self._quiet_until = -math.inf  # what was written last is to be whole before this is drawn again

    def add(self, progress: Progress) -> None:
        with self._lock:
            self._shown = [each for each in self._shown if not each._gives_way] + [progress]
            if self.give_way not in streams.before_output:
                streams.before_output.append(self.give_way)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
                self._thread.start()
            self.draw()

    def remove(self, progress: Progress) -> None:
        with self._lock:
            if progress in self._shown:
                self._shown.remove(progress)
            self._clear()

    def print(self, text: str) -> None:
        """Writes a line above this one."""
        with self._lock:
            self._clear()
            write_line(text)
            self._inside_a_line, self._quiet_until = False, -math.inf
            self.draw()

    def draw(self) -> None:
        with self._lock:
            now = time.monotonic()
            if not self._shown or self._inside_a_line or now < self._quiet_until:
                return
            progress = self._shown[-1]
            if progress._live:
                self._write(f"\r{progress.live_line(terminal_width() - 1)}\x1b[K")
                self._is_drawn = True

    def give_way(self, text: str) -> None:
        """Called before something else is written to the terminal."""
        with self._lock:
            if not self._is_drawing:
                self._clear()
                self._shown = [each for each in self._shown if not each._gives_way]
                self._inside_a_line = not text.endswith("\n")
                self._quiet_until = time.monotonic() + 0.1

    def _clear(self) -> None:
        if self._is_drawn:
            self._write("\r\x1b[K")
            self._is_drawn = False

    def _write(self, text: str) -> None:
        self._is_drawing = True
        try:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(text)
                sys.stderr.flush()
        finally:
            self._is_drawing = False

    def _run(self) -> None:
        while True:
            time.sleep(DRAW_SECONDS)
            with self._lock:
                if not self._shown:
                    self._thread = None
                    return
                self.draw()
                self._shown[-1].beat()


def stdout_width() -> int:
    """Columns that a table at stdout may have: those of its terminal, 0 (as many as it likes) where it is none."""
    return terminal_width(1) if is_terminal(sys.stdout) else 0


def terminal_width(number: int = 2) -> int:
    """Columns of the terminal at a stream now (1: stdout, 2: stderr), or of COLUMNS where it does not tell."""
    for width in (_columns_of(number), os.environ.get("COLUMNS", "")):
        if str(width).isdecimal() and int(width) >= MIN_WIDTH:
            return min(int(width), 1000)
    return UNKNOWN_WIDTH


def _columns_of(number: int) -> int:
    try:
        return os.get_terminal_size(number).columns
    except OSError:
        return 0


_BOTTOM = _Bottom()


def _start_anew() -> None:
    global _BOTTOM
    streams.before_output.clear()
    _BOTTOM = _Bottom()  # the thread is not forked, and its lock may be held


os.register_at_fork(after_in_child=_start_anew)
