"""Whether a measurement had the processors to itself: time of this process and of all others, by the system's counts.

start = CpuTimes.now()
...
trusted = CpuTimes.now().is_undisturbed_since(start)
"""

import contextlib
import dataclasses
import os
import time
from pathlib import Path

MIN_OWN_SHARE = 0.9  # of the processors' time: what a measurement that nothing disturbed gets
MAX_OTHERS_SHARE = 0.1  # of our processors' time, in all other programs together


def usable_cores() -> float:
    """Processors that this process may use: fewer than the machine's where it is bound to some, or limited."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return float(cores)


@dataclasses.dataclass(frozen=True)
class CpuTimes:
    """Seconds since some moment: by the clock, of this process on all processors, of all programs (None: unknown)."""

    clock: float
    own: float
    all: float | None

    @classmethod
    def now(cls) -> "CpuTimes":
        return cls(time.perf_counter(), time.process_time(), _busy_seconds())

    def is_undisturbed_since(self, start: "CpuTimes") -> bool:
        """Whether between the two this process had the processors to itself, as far as can be seen."""
        available = usable_cores() * (self.clock - start.clock)
        own = self.own - start.own
        if own >= MIN_OWN_SHARE * available:
            return True
        if self.all is None or start.all is None:
            return False
        return self.all - start.all - own <= MAX_OTHERS_SHARE * available


def _busy_seconds() -> float | None:
    """Seconds of all processors in all programs, with those a host took away; None where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
