"""Files that are whole or not there: atomic writes, digests, and logs of one JSON object a line.

write_atomically(path, "text")                # or bytes; a kill or a full disk leaves the old file as it was
with atomic_writer(path) as file:             # the same for content that comes in parts
    file.write(b"…")
JsonLines(path).append({"step": 1})           # in the file when the call returns
records = read_json_lines(path)
values = json_object(path.read_bytes(), path, "copy it again")  # one line names the file and the remedy otherwise
"""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_RECORDS_BYTES = 1 << 30  # of a file of records; a million steps take 300 MB
LONG_FILE, MAX_SPARSENESS = 1 << 28, 1000  # bytes; times that a file is longer than what it takes on disk
LINKED = (
    "base"  # in a workdir, the base of a fine-tuned model: a folder, or a link to one, which is checked when opened
)
MAX_NAME_BYTES = 240  # of a name that still has room for the end of a temporary one


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A file to write, under the name `path` only when it is whole and on disk; an error leaves nothing of it.

    What is no regular file, such as /dev/null, is written to and not replaced.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    name = path.name if len(os.fsencode(path.name)) < MAX_NAME_BYTES else path.name[:60]
    partial = path.with_name(name + ".partial")
    try:
        with partial.open("wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the content of a file. Text is written as UTF-8."""
    with atomic_writer(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def json_object(text: str | bytes, name: object, remedy: str) -> dict[str, Any]:
    """The JSON object that a text is. Raises ValueError, in one line with `name` and `remedy`, when it is none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON ({error}); {remedy}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a JSON object; {remedy}")
    return values


def check_inside(folder: Path, path: Path, max_bytes: int = 0) -> None:
    """Raises ValueError, in one line, for a link out of `folder`, or a file of more than `max_bytes` (0: of any size).

    What comes from elsewhere is data: reading it must not lead to other files, nor fill the memory.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} must lie in {folder}, and is a link to another place; put the file itself there")
    if max_bytes:
        check_length(path, max_bytes)


def check_length(path: Path, max_bytes: int) -> None:
    """Raises ValueError, in one line, for a file that is too long to be what it is read as."""
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path} must have at most {max_bytes:,} bytes, and has {path.stat().st_size:,}; restore it")


def check_entries(folder: Path) -> None:
    """Raises ValueError, in one line, for what a folder from elsewhere may hold to lead its readers astray.

    That is a link to another place (but for `LINKED`), a pipe or device (which may never end), or a file that claims to
    be many times as long as what is on disk.
    """
    top, todo = folder.resolve(), [folder]
    while todo:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if entry.is_symlink():
                    if Path(entry.path) != folder / LINKED:
                        check_inside(top, Path(entry.path))
                elif entry.is_dir():
                    todo.append(Path(entry.path))
                elif not stat.S_ISREG(status.st_mode):
                    raise ValueError(f"{entry.path} must be a file or folder, and is a pipe or device; remove it")
                elif status.st_size > max(LONG_FILE, MAX_SPARSENESS * 512 * status.st_blocks) and _has_hole(entry.path):
                    size = f"claims {status.st_size:,} bytes, of which the disk has {512 * status.st_blocks:,}"
                    raise ValueError(f"{entry.path} {size}; remove it, or restore it from a copy")


def _has_hole(path: str) -> bool:
    """Whether a file is sparse; some file systems count no blocks, but they know of no holes either."""
    with open(path, "rb") as file:
        return os.lseek(file.fileno(), 0, os.SEEK_HOLE) < os.fstat(file.fileno()).st_size


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut; does nothing where the system cannot."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_folders(folder: Path) -> None:
    """`sync_folder` of a folder and of all below it."""
    for root, _, _ in os.walk(folder):
        sync_folder(Path(root))


class JsonLines:
    """Appends records to a file, one JSON object a line; a line that a kill left incomplete is removed first."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(path)
        self._path = path

    def append(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json_line(record) + "\n")


def _end_last_line(path: Path) -> None:
    """Adds the newline that the last line lacks, or removes the line where it is not a whole record."""
    content = path.read_bytes() if path.exists() else b""
    last_line = content.rpartition(b"\n")[2]
    if not last_line:
        return
    with path.open("r+b") as file:
        try:
            json.loads(last_line)
            file.seek(len(content))
            file.write(b"\n")
        except ValueError:
            file.truncate(len(content) - len(last_line))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, in order; incomplete lines are skipped, and a missing file has no records."""
    records = []
    for line in iter_lines(path):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def iter_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file of records, with their ends; none where it is missing. Raises ValueError for a huge file."""
    if path.exists():
        check_inside(path.parent, path, MAX_RECORDS_BYTES)
        with path.open("rb") as file:
            yield from file


def to_json(value: Any) -> Any:
    """`value` in JSON's types, whatever is nested in it: scalars of numpy and JAX become Python's, tuples lists, and
    numbers that are not finite None."""
    if isinstance(value, Mapping):
        return {field: to_json(inner) for field, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    plain = value.item() if hasattr(value, "item") else value
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def json_line(value: Any) -> str:
    """One line of JSON that every reader takes: what has no value is null, never NaN or Infinity."""
    return json.dumps(to_json(value), allow_nan=False)
