"""Signals that ask a run to save and stop, and a clock that stands still while the process is stopped.

    with StopSignals() as signals:
        while not signals.number:      # SIGINT, SIGTERM, SIGHUP or SIGUSR1: finish the step, save, stop
            step()

A second Ctrl-C ends the process at once, whatever it is computing: a thread watches, since Python's own handlers wait
until the call under way has returned. A second SIGHUP or SIGTERM changes nothing: a terminal that is closed, and a
service manager, send several.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tale_jax.utils.streams import notice

SAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
BEAT = 0.25  # seconds between two looks at the clock
SHOW_CURSOR = b"\x1b[?25h"

# Called with the exit code when a script ends, after its last line was written.
before_exit: list[Callable[[int], object]] = []


class StopSignals:
    """Catches the signals in `SAVING` until the `with` ends; of one that is ignored (`nohup`) nothing is caught.

    Attributes:
      number: of the first signal; 0: none so far.
      stopped_seconds: how long SIGSTOP or Ctrl-Z held the process.
    """

    def __init__(self) -> None:
        self.number, self.stopped_seconds = 0, 0.0

    def clock(self) -> float:
        """Seconds, as `time.perf_counter`, without those in which the process or the machine stood still."""
        return time.perf_counter() - self.stopped_seconds

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        self._usual: dict[int, Any] = {}
        for number in (*SAVING, signal.SIGCONT):
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                self._usual[number] = signal.signal(number, lambda *_: None)
        self._usual_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._usual_fd)
        os.write(self._writer, b"\0")  # no signal has this number
        self._watcher.join()
        os.close(self._reader)
        os.close(self._writer)

    def _watch(self) -> None:
        seen, gap = time.perf_counter(), 0.0
        while True:
            readable = select.select([self._reader], [], [], BEAT)[0]
            numbers = os.read(self._reader, 512) if readable else b""
            last_gap, gap, seen = gap, time.perf_counter() - seen, time.perf_counter()
            for number in numbers:
                if not number:
                    return
                if number == signal.SIGCONT:
                    self.stopped_seconds += max(0.0, max(gap, last_gap) - BEAT)
                    gap = 0.0
                else:
                    self._receive(number)

    def _receive(self, number: int) -> None:
        if number == signal.SIGHUP:  # the terminal is gone, and writing to it would be an error
            null = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(null, terminal)
            os.close(null)
        if not self.number:
            self.number = number
            notice("stops after this step and saves; Ctrl-C now quits at once")
        elif number == signal.SIGINT:
            sys.stderr.flush()
            os.write(2, (SHOW_CURSOR if 2 in self._terminals else b"") + b"\nquit at once; what was saved is whole\n")
            os._exit(128 + number)
