"""Paths that people give: what `~` stands for, what may be done there, and how they look in a message.

expanded("~/runs/one", "--workdir")           # Path("/users/me/runs/one")
fault = fault_of(path, "folder to write")     # "" or why not, in a few words with a remedy
"""

import errno
import os
import re
import shlex
from pathlib import Path

from tale_jax.utils.streams import escaped

KINDS = ("folder", "folder to write", "file", "file to write", "path to make", "path")


def printable_path(path: Path | str) -> str:
    r"""A path for a message: one line, without control characters, and bytes that are no UTF-8 as \xNN."""
    return "".join(c if c.isprintable() else escaped(c) for c in str(path))


def quoted(path: Path | str) -> str:
    r"""A path as a word of a shell's command line that a terminal can show: what cannot be printed as bytes, \xc2."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(_as_word(character) for character in text) + "'"


def _as_word(character: str) -> str:
    """One character between $' and '."""
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def expanded(path: str, field: str) -> Path:
    """A path of the command line, with `~` at its start expanded.

    Raises ValueError, in one line that names `field`, where the path is blank, or no home is known.
    """
    shown = f"{field}={printable_path(path)}"
    if not path.strip():
        raise ValueError(f"{shown} must name a file or folder; write its path")
    if "\0" in path:
        raise ValueError(f"{shown} must not hold a NUL character; no file system has it in a name")
    try:
        return Path(path).expanduser() if path.startswith("~") else Path(path)  # ./~x is a name
    except RuntimeError:
        user = re.split("/", path)[0][1:]
        why = f"there is no user {printable_path(user)}" if user else "HOME is not set"
        raise ValueError(f"{shown}: ~ has no meaning here ({why}); write it out, or as ./{path}") from None


def fault_of(path: Path, kind: str) -> str:
    """Why `path` cannot be used as one of `KINDS`, with a remedy; "" where it can.

    "folder" and "file" are read, and must exist; what is written need not, but the folder above can be made. A "path to
    make" must not exist; of a "path" nothing is known yet.
    """
    if kind == "path":
        return ""
    to_write, wants_folder = kind.endswith("to write"), kind.startswith("folder")
    try:
        if kind == "path to make":
            if os.path.lexists(path):
                return "must not exist yet, so that nothing is lost; remove it, or give another name"
            return _fault_of_parents(path)
        there = _exists(path)
        if wants_folder and not _is_utf8(path):
            return "must have a name in UTF-8, as the folders above it: no other can hold checkpoints; rename it"
        if there and wants_folder and not os.path.isdir(path):
            return "must be a folder, and it is a file; give the folder"
        if there and not wants_folder and os.path.isdir(path):
            return "must be a file, and it is a folder; give the path of a file"
        if not there and not to_write:
            return f"must be a {kind}, and does not exist; check its path"
        if not there or (to_write and not wants_folder and os.path.isfile(path)):
            return _fault_of_parents(path.parent if there else path)
        mode = os.W_OK | os.X_OK if to_write and wants_folder else os.W_OK if to_write else os.R_OK
        if not _may(path, mode | (os.X_OK if wants_folder else 0)):
            return f"may not be {'written to' if to_write else 'read'} (permission denied); give another, or chmod it"
    except OSError as error:
        return _in_words(error)
    return ""


def _is_utf8(path: Path) -> bool:
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        return False
    return True


def _may(path: Path, mode: int) -> bool:
    """Whether this process may do so with its rights of now."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _exists(path: Path) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise OSError(errno.ENOENT, "it is a link to nothing") from None
        return False
    return True


def _fault_of_parents(path: Path) -> str:
    """Why nothing can be made at `path`, "" where it can: the nearest folder above that exists decides."""
    longest = 0  # bytes of a name that is to be made
    while not os.path.lexists(path) and path != path.parent:
        longest, path = max(longest, len(os.fsencode(path.name))), path.parent
    name = printable_path(path)
    if not os.path.isdir(path):
        return f"cannot be made, since {name} is no folder; give another path"
    if not _may(path, os.W_OK | os.X_OK):
        return f"cannot be made, since {name} may not be written to; give another path, or chmod it"
    if longest > os.pathconf(path, "PC_NAME_MAX"):
        return _in_words(OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG)))
    return ""


def _in_words(error: OSError) -> str:
    remedy = {
        errno.ENAMETOOLONG: "give a shorter name",
        errno.ELOOP: "its links lead in a circle; give another path",
        errno.EACCES: "give another path, or chmod the folders above it",
        errno.ENOTDIR: "a part of it is a file; give another path",
    }.get(error.errno or 0, "give another path")
    return f"cannot be used ({error.strerror or error}); {remedy}"
