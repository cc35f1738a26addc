"""Holds a process at a moment that it reaches by itself, so that a signal meets it there, however fast the machine is.

Python imports this module when it starts and its folder is on PYTHONPATH. HOLD_AT=saving:37 stops the process (SIGSTOP)
just before the 37th thing that it does to a file while it saves; HOLD_COUNTS=FILE gets a line for each such thing, the
part of the run it belongs to. What libraries write without Python is no event: it happens between two.
"""

import collections
import os
import signal
import sys

# The process itself, also where it starts itself anew (execv), and not those that it starts beside it.
PROCESS = int(os.environ.setdefault("HOLD_PROCESS", str(os.getpid())))
part, _, number = os.environ.get("HOLD_AT", "").partition(":")
file = os.environ.get("HOLD_COUNTS", "")
counts: collections.Counter[str] = collections.Counter()
state = {"saves": False, "deletes": False}
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def part_of(event: str, arguments: tuple) -> str:
    """Which part of a run changes a file by this event; "" where none does."""
    if event == "open":
        mode, flags = arguments[1], arguments[2] or 0
        writes = set(mode) & set("wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes:
            return ""
    elif event not in CHANGES:
        return ""
    paths = [os.fsdecode(each) for each in arguments[:2] if isinstance(each, str | bytes | os.PathLike)]
    path = paths[-1] if event == "os.rename" and paths else paths[0] if paths else ""
    if path.endswith("-tmp-deleted"):
        state["deletes"] = event != "os.rmdir"
        return "deleting"
    if state["deletes"] and event in ("os.remove", "os.rmdir"):  # by names within it
        return "deleting"
    if "/checkpoints/.saving" in path:
        state["saves"] = event != "os.remove"
        return "saving"
    if state["saves"] and "/checkpoints/" in path:
        return "saving"
    if path.endswith("/metrics.jsonl"):
        return "stepping"
    if "/tokenizer/" in path or "/windows/" in path:
        return "preparing"
    return ""


def hold(event: str, arguments: tuple) -> None:
    if (event == "open" or event in CHANGES) and os.getpid() == PROCESS and (found := part_of(event, arguments)):
        counts[found] += 1
        if file:
            os.write(lines, f"{found}\n".encode())
        if found == part and counts[found] == int(number):
            os.kill(PROCESS, signal.SIGSTOP)


if os.getpid() == PROCESS and (part or file):
    lines = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if file else -1
    sys.addaudithook(hold)
