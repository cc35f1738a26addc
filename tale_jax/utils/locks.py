"""One writer for a folder: a second one is refused in a line that names the first.

    with writer_lock(workdir, "train"):
        ...                              # readers need no lock: what they read is written atomically

The lock is the kernel's (`flock`), so that it ends with its process, however that ends, and nobody has to clear up. The
file says who holds it: process, machine, start time. It stays, except where its holder failed and has removed all that
it had made.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tale_jax.utils.files import check_entries

LOCK_FILE = ".lock"
_held: set[Path] = set()  # folders that this process has locked


@contextmanager
def writer_lock(folder: Path, task: str, of_worth: Callable[[Path], Sequence[Path]] | None = None) -> Iterator[None]:
    """Holds the one lock of `folder`; `task` says what for, as "train".

    The folder is made when missing. A process may take the lock again that it holds, and gives it back with the first.
    On a file system that has no locks nothing is held, and nothing refused.

    Where what is done under the lock fails, and has made nothing that `of_worth` finds in the folder (None: whatever it
    has made is of worth), the folder is as it was before: a command that was refused leaves no trace.

    Raises:
      ValueError: one line with the process that holds the lock, or with what in the folder leads out of it.
      OSError: the folder cannot be written.
    """
    if (key := folder.resolve()) in _held:
        yield
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]  # the innermost first
    handle, entries = _open_lock(folder)
    try:
        worth = of_worth(folder) if of_worth else None
        holder = {"task": task, "process": os.getpid(), "machine": socket.gethostname(), "start_time": time.time()}
        with contextlib.suppress(OSError):  # who holds it is for people; that it is held, the kernel knows
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(holder).encode(), 0)
        _held.add(key)
        try:
            yield
        except BaseException:
            if of_worth and of_worth(folder) == worth:
                _remove_all_but(entries, folder, missing)
            raise
    finally:
        _held.discard(key)
        os.close(handle)  # which ends the lock


def is_locked(folder: Path) -> bool:
    """Whether a writer, in this process or another, holds the lock of `folder`."""
    try:
        handle = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(handle)
    return False


def _open_lock(folder: Path) -> tuple[int, set[str]]:
    """The locked file, and what stood in the folder before; both are made when missing."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        check_entries(folder)
        entries, path = set(os.listdir(folder)), folder / LOCK_FILE
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # the folder was removed since, by one who failed
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                refusal = _refusal(folder, _read_holder(handle))
                os.close(handle)
                raise ValueError(refusal) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                return handle, entries
        os.close(handle)  # of a file that was removed since


def _remove_all_but(entries: set[str], folder: Path, missing: list[Path]) -> None:
    """Removes what was added to the folder, and the folders that were made for it where they are empty."""
    with contextlib.suppress(OSError):
        for name in set(os.listdir(folder)) - entries:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for made in missing:
            made.rmdir()


def _read_holder(handle: int) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        holder = json.loads(os.pread(handle, 4096, 0))
        if isinstance(holder, dict):
            return holder
    return {}


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    process, machine = holder.get("process"), holder.get("machine")
    who = f"{holder.get('task', 'another program')} (process {process} on {machine}" if process else "another process ("
    since = holder.get("start_time")
    if process and isinstance(since, int | float):
        who += time.strftime(", since %Y-%m-%d %H:%M:%S", time.localtime(since))
    stop = f"stop it with `kill {process}`" if machine == socket.gethostname() else "stop it"
    return f"workdir={folder} is in use by {who}); wait until it ends, {stop}, or give another --workdir"
