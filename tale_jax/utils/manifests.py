"""Manifests: what the files of a folder must hold, so that a damaged one is found before it is believed.

A manifest is a JSON object with the SHA-256 sum and size of each file, any facts besides, and a sum of its own. It is
written last and atomically, when everything it names is on disk: a folder without a whole manifest is not finished.

    write_manifest(folder, {"step": 100})          # hashes and syncs every file below the folder
    facts = check_manifest(folder)                 # raises ValueError that names the first bad file

Files that are written one after another can be hashed while the others are on their way:

    sums = SumsAhead(lambda: [folder])             # a thread hashes what has been finished
    ...                                            # the files are written
    write_manifest(folder, {"step": 100}, sums.stop())
"""

import contextlib
import errno
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tale_jax.utils.files import sync_folder, sync_folders, write_atomically

MANIFEST = "manifest.json"
MAX_BYTES = 16 << 20  # of a manifest; one of a checkpoint has some kilobytes
BLOCK = 1 << 20  # bytes read at once
THREADS = 2  # that hash files; more would wait for the disk
IDLE_SECONDS = 0.1  # since a file was written to, above the resolution of its time: a later change has another one
FileState = tuple[int, int, int]  # inode, bytes and time of change in ns: another content has another one


def digest_of(values: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path, sync: bool = False, known: Mapping[FileState, str] | None = None) -> tuple[str, int]:
    """SHA-256 in hexadecimal digits, and bytes. With `sync` the file is on disk afterwards.

    `known`: digests of files, by their state; what is among them is not read.
    """
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for a writer
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if sync:
            os.fsync(handle)
        if known and (found := known.get(_file_state(status))):
            return found, status.st_size
        while block := os.read(handle, BLOCK):
            digest.update(block)
            size += len(block)
    finally:
        os.close(handle)
    return digest.hexdigest(), size


def _file_state(status: os.stat_result) -> FileState:
    return status.st_ino, status.st_size, status.st_mtime_ns


class SumsAhead:
    """A thread that hashes files below folders while others are being written there.

    A file is hashed when nothing has been written to it for a while; what changes afterwards is found by its state.
    `folders` is asked again and again, since a folder may get its name at the end only.

    Attributes:
      known: the digests so far.
    """

    def __init__(self, folders: Callable[[], Iterable[Path]]):
        self._folders, self.known = folders, dict[FileState, str]()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(IDLE_SECONDS / 2):
            for folder in self._folders():
                for name in files_below(folder):
                    if self._stopped.is_set():
                        return
                    with contextlib.suppress(OSError):  # renamed meanwhile, or gone
                        self._hash(folder / name)

    def _hash(self, path: Path) -> None:
        status = path.lstat()
        state = _file_state(status)
        if stat.S_ISREG(status.st_mode) and state not in self.known and time.time() - status.st_mtime > IDLE_SECONDS:
            digest, _ = hash_file(path)
            if _file_state(path.lstat()) == state:
                self.known[state] = digest

    def stop(self) -> Mapping[FileState, str]:
        """Ends the thread; the digests of what it came to, for `write_manifest`."""
        self._stopped.set()
        self._thread.join()
        return self.known


def files_below(folder: Path) -> list[str]:
    """Relative POSIX paths of all files but the manifest, sorted. Links are listed and not followed."""
    found = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [Path(root, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(name for name in found if name != MANIFEST)


def make_manifest(
    folder: Path, facts: Mapping[str, Any], known: Mapping[FileState, str] | None = None, *, sync: bool = False
) -> dict[str, Any]:
    """The facts, and the digest and size of every file below `folder`; with `sync` these are on disk afterwards."""
    names = files_below(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(lambda name: hash_file(folder / name, sync, known), names)
        files = {name: [digest, size] for name, (digest, size) in zip(names, sums, strict=True)}
    return {"files": files, **facts}


def write_manifest(folder: Path, facts: Mapping[str, Any], known: Mapping[FileState, str] | None = None) -> None:
    """Hashes every file below `folder` but those `known`, and syncs all (a power cut may come); then writes."""
    content = make_manifest(folder, facts, known, sync=True)
    sync_folders(folder)
    write_atomically(folder / MANIFEST, json.dumps(content | {"sha256": digest_of(content)}, indent=1) + "\n")
    sync_folder(folder.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, whole and unchanged; the files are not looked at.

    Raises ValueError, in a few words, when there is none or it was damaged.
    """
    path = folder / MANIFEST
    try:
        if not path.is_file() or path.is_symlink():
            raise ValueError(f"{MANIFEST} is missing")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{MANIFEST} is too large")
        content = json.loads(path.read_bytes())
        own = content.pop("sha256")
        if digest_of(content) != own or not _are_sums(content["files"]):
            raise ValueError(f"{MANIFEST} is damaged")
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        said = str(error) if str(error).startswith(MANIFEST) else f"{MANIFEST} is damaged"
        raise ValueError(said) from None
    return content


def _are_sums(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(name, str) and not name.startswith("/") and ".." not in name.split("/") and len(entry) == 2
        for name, entry in files.items()
    )


def bad_files(folder: Path, manifest: Mapping[str, Any], only: Collection[str] = ()) -> Iterator[str]:
    """What is wrong with the files of a folder, a few words for each: missing, changed, or not in the manifest.

    `only`: first parts of the paths to look at (an item of a checkpoint, say); (): all.
    """
    wanted = {n: s for n, s in manifest["files"].items() if not only or n.split("/")[0] in only}
    there = [name for name in files_below(folder) if not only or name.split("/")[0] in only]
    yield from (f"{name} is not in its manifest" for name in there if name not in wanted)
    names = [name for name in wanted if name in set(there)]
    yield from (f"{name} is missing" for name in wanted if name not in set(there))
    right_size = []
    for name in names:
        if (folder / name).lstat().st_size == wanted[name][1]:
            right_size.append(name)
        else:
            yield f"{name} has {(folder / name).lstat().st_size} bytes instead of {wanted[name][1]}"

    def hashed(name: str) -> str:
        try:
            return hash_file(folder / name)[0]
        except OSError as error:  # a bad block, a link, no permission
            return error.strerror or type(error).__name__

    with ThreadPoolExecutor(THREADS) as pool:
        for name, digest in zip(right_size, pool.map(hashed, right_size), strict=True):
            if digest != wanted[name][0]:
                changed = len(digest) == 64
                yield f"{name} is damaged" if changed else f"{name} cannot be read ({digest})"


def check_manifest(folder: Path, only: Collection[str] = ()) -> dict[str, Any]:
    """The manifest, when it and every file it names are whole. Raises ValueError, in a few words, with a fault."""
    manifest = read_manifest(folder)
    if fault := next(bad_files(folder, manifest, only), ""):
        raise ValueError(fault)
    return manifest
