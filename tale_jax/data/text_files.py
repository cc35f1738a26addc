"""Finds text files and decodes them: the one place where paths become files, and bytes become text.

    found = find_files("my-texts/", workdir)       # .txt, .md, .jsonl, .csv, .parquet, …, each also compressed
    for block in read_text(found.files[0], ""): …  # str; a byte-order mark at the start is dropped

What cannot be read is an error of one line that names the file, what it is, and the command that converts *it*.
"""

import bz2
import codecs
import contextlib
import difflib
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tale_jax.data.encodings import (
    SAMPLE_BYTES,
    bom_of,
    encoding_of,
    format_of,
    is_binary,
    wide_encoding_of,
)
from tale_jax.utils.extras import has_library, missing_extra
from tale_jax.utils.paths import expanded, printable_path, quoted

TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".text")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}  # suffix → program
READABLE = ".txt, .md, .text, .jsonl, .json, .csv, .tsv or .parquet files (also .gz, .zst, .bz2, .xz)"

BLOCK_BYTES = 1 << 20  # read at once
WHOLE_DIGEST_BYTES = 4 << 20  # of a longer file, blocks at fixed places are hashed
DIGEST_BLOCKS, DIGEST_BLOCK_BYTES = 32, 1 << 16

# What a run writes into its workdir, where the texts lie in the same folder.
WORKDIR_NAMES = {"windows", "tokenizer", "checkpoints", "tensorboard", "wandb"}
WORKDIR_FILES = {"config.json", "log.txt", "metrics.jsonl", "samples.jsonl", "report.html"}

ICONV_NAMES = {
    "latin-1": "ISO-8859-1",
    "mac-roman": "MACINTOSH",
    "mac-cyrillic": "MAC-CYRILLIC",
    "iso2022_jp": "ISO-2022-JP",
}


# Paths.


class Found(NamedTuple):
    """The files of a corpus, sorted, and what was left out, a line for people each."""

    files: list[Path]
    notes: list[str]


printable = printable_path


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, in lower case, without that of its compression: ".txt" of "a.TXT.gz"."""
    return _suffixes(path)[0]


def _suffixes(path: Path) -> tuple[str, str]:
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in COMPRESSED else (suffix, "")


def expand(path: str, field: str = "corpus.path") -> Path:
    """A path of the command line, with `~` at its start expanded. Raises ValueError where no home is known."""
    return expanded(path, field) if path else Path()


def find_files(pattern: str, workdir: Path | None = None) -> Found:
    """The files of a file, folder (with all in it) or glob.

    Links are followed, a folder once. Left out are hidden files and folders, other kinds of files, and workdirs.

    Args:
      pattern: taken literally where that exists, and as a glob only where it does not.
      workdir: of the run, which never reads what it wrote itself.

    Raises:
      ValueError: one line, where there is no text.
    """
    field = f"corpus.path={printable(pattern)}"
    if "\0" in pattern:
        raise ValueError(f"{field} must not hold a NUL character; give a file, a folder or a glob")
    path = expand(pattern)
    walk = _Walk(workdir)
    if os.path.isdir(path):
        walk.add_folder(path)
    elif os.path.lexists(path):
        _check_single_file(path, field)
        walk.files.append(path)
    else:
        names = sorted(glob.glob(str(path), recursive=True))
        if not names:
            raise ValueError(f"{field} does not exist{_near(path)}; give a file, a folder or a glob")
        for name in names:
            if os.path.isdir(name):
                walk.add_folder(Path(name), named=False)
            else:
                walk.add_file(Path(name))
    files = sorted(set(walk.files), key=lambda file: [os.fsencode(part) for part in file.parts])
    if not files:
        what = f"; it has {', '.join(notes)}" if (notes := walk.notes()) else ""
        empty = "that are not empty " if walk.left_out["empty"] else ""
        raise ValueError(f"{field} must hold {READABLE} {empty}to learn from{what}; add text, or rename or convert it")
    _check_libraries(files)
    return Found(files, walk.notes())


def _check_libraries(files: list[Path]) -> None:
    """Raises ValueError where a library is missing that one of the files needs: before the first is read."""
    for file in files:
        kind, compression = _suffixes(file)
        if compression == ".zst":
            _check_zstd(file)
        if kind == ".parquet" and not has_library("pyarrow"):
            raise ValueError(missing_extra(f"corpus.path={printable(file)}", "pyarrow", "hub"))


def _check_zstd(path: Path) -> None:
    if not has_library("compression.zstd") and not has_library("pyarrow"):
        missing = missing_extra(f"corpus.path={printable(path)}", "Python 3.14 or pyarrow", "hub")
        raise ValueError(f"{missing}, or unzstd {quoted(path)}")


def _check_single_file(path: Path, field: str) -> None:
    if not os.path.exists(path):
        raise ValueError(f"{field} is a link to nothing; give a file, a folder or a glob")
    if not os.path.isfile(path):
        raise ValueError(f"{field} is no regular file, and text is read more than once; write it to a file first")
    if not path.stat().st_size:
        raise ValueError(f"{field} must hold a file that is not empty; give one with text")
    if kind_of(path) not in TEXT_SUFFIXES + ROW_SUFFIXES:
        remedy = f"if it is text: mv {quoted(path)} {quoted(f'{path}.txt')}"
        raise ValueError(f"{field} must be one of {READABLE}; {remedy}")


def _near(path: Path) -> str:
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(path.parent) if not name.startswith(".")]
        if near := difflib.get_close_matches(path.name, names, n=1):
            return f"; did you mean {printable(path.parent / near[0])}?"
    return ""


def is_workdir(folder: Path) -> bool:
    """Whether a folder holds an experiment, or the beginning of one."""
    return (folder / "windows").is_dir() and ((folder / "config.json").is_file() or (folder / "tokenizer").is_dir())


class _Walk:
    """Collects files, and counts what is left out."""

    def __init__(self, workdir: Path | None):
        self.files: list[Path] = []
        self.left_out: Counter[str] = Counter()
        self._workdir = _identity(workdir) if workdir else None
        self._workdirs: list[Path] = []
        self._seen: set[tuple[int, int]] = set()

    def add_folder(self, root: Path, named: bool = True) -> None:
        """All files below `root`: those of real folders first, so that a link to one of them adds nothing.

        A folder that is `named` is read even where it is a workdir, but for what runs write.
        """
        top = _identity(root) if named else None
        above = {_identity(parent) for parent in Path(os.path.realpath(root)).parents}
        queue, links = [root], []
        while queue or links:
            folder = queue.pop() if queue else links.pop(0)
            identity = _identity(folder)
            if identity is None or identity in self._seen or identity in above:
                continue  # a link back: what is there is read already, or holds the corpus itself
            self._seen.add(identity)
            if identity != top and (identity == self._workdir or is_workdir(folder)):
                self._workdirs.append(folder)
                continue
            try:
                with os.scandir(folder) as found:
                    entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
            except OSError:
                self.left_out["folders that cannot be opened"] += 1
                continue
            mixed = is_workdir(folder)  # the texts lie in the workdir itself
            for entry in entries:
                if entry.name.startswith(".") or (mixed and entry.name in WORKDIR_NAMES | WORKDIR_FILES):
                    continue
                if os.path.isdir(entry.path):
                    (links if entry.is_symlink() else queue).append(Path(entry.path))
                else:
                    self.add_file(Path(entry.path))
            if mixed:
                self._workdirs.append(folder)

    def add_file(self, path: Path) -> None:
        kind = kind_of(path)
        try:
            status = path.stat()
        except OSError:
            self.left_out["links to nothing" if path.is_symlink() else "that cannot be opened"] += 1
            return
        if not stat.S_ISREG(status.st_mode):
            self.left_out["no regular files"] += 1
        elif kind not in TEXT_SUFFIXES + ROW_SUFFIXES:
            self.left_out[printable(path.suffix[:12]) or "without a suffix"] += 1
        elif not status.st_size:
            self.left_out["empty"] += 1
        elif kind == ".json" and not _holds_rows(path):
            self.left_out[".json without rows"] += 1
        else:
            self.files.append(path)

    def notes(self) -> list[str]:
        lines = []
        if total := sum(self.left_out.values()):
            parts = ", ".join(f"{count:,} {what}" for what, count in sorted(self.left_out.items()))
            were = "1 file was" if total == 1 else f"{total:,} files were"
            lines.append(f"{were} not read: {parts} (hidden files are left out)")
        for folder in sorted(set(self._workdirs)):
            lines.append(f"{printable(folder)} is the folder of a run: what the run wrote there is left out")
        return lines


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _holds_rows(path: Path) -> bool:
    """Whether a .json file is an array, or one object a line; another program's settings are neither."""
    try:
        head = "".join(itertools.islice(read_text(path, ""), 1)).lstrip()
    except (ValueError, OSError):
        return True  # which reading it will tell
    if head[:1] != "{":
        return head[:1] == "["
    line, end, _ = head.partition("\n")
    try:
        return isinstance(json.loads(line), dict) and bool(end)
    except (ValueError, RecursionError):
        return not end  # an object longer than the block


def fingerprint(files: list[Path]) -> dict[str, Any]:
    """Number and bytes of the files, and digests of their names and sizes, and of these with their contents.

    Of a file up to `WHOLE_DIGEST_BYTES` every byte counts, of a longer one blocks at fixed places.
    """
    if not files:
        return {}
    base = os.path.commonpath([file.absolute().parent for file in files])
    listing = [(file.absolute().relative_to(base).as_posix(), file.stat().st_size) for file in files]
    contents = hashlib.blake2b(digest_size=16)
    for file, name_and_size in zip(files, listing, strict=True):
        contents.update(json.dumps(name_and_size).encode() + _content_digest(file))
    digest = hashlib.blake2b(json.dumps(listing).encode(), digest_size=16).hexdigest()
    total = sum(size for _, size in listing)
    return {"files": len(files), "bytes": total, "names_and_sizes": digest, "contents": contents.hexdigest()}


def _content_digest(path: Path) -> bytes:
    digest, size = hashlib.blake2b(digest_size=16), path.stat().st_size
    with path.open("rb", buffering=0) as file:
        if size <= WHOLE_DIGEST_BYTES:
            digest.update(file.read())
        else:
            for index in range(DIGEST_BLOCKS):
                file.seek(index * (size - DIGEST_BLOCK_BYTES) // (DIGEST_BLOCKS - 1))
                digest.update(file.read(DIGEST_BLOCK_BYTES))
    return digest.digest()


# Bytes to text.


@contextlib.contextmanager
def open_binary(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed where its name says so.

    Raises ValueError, in one line, for a compressed file that is damaged or only called so, and a missing library.
    """
    compression = _suffixes(path)[1]
    with path.open("rb") as raw:
        if not compression:
            yield raw
            return
        head = raw.read(SAMPLE_BYTES)
        raw.seek(0)
        wanted = f"compressed with {COMPRESSED[compression]}"
        found = format_of(head)
        if found is None:
            remedy = f"mv {quoted(path)} {quoted(path.with_suffix(''))}"
            raise ValueError(f"{printable(path)} is not {wanted}, whatever its name says; {remedy}")
        if found[0] != wanted:
            raise ValueError(f"{printable(path)} is {found[0]}, not {wanted}; {format_remedy(path, found[1], False)}")
        try:
            with _decompressor(raw, compression, path) as file:
                yield file
        except _Damaged as error:
            raise ValueError(
                f"{printable(path)} is damaged or not whole ({error}); download or compress it again"
            ) from None


class _Damaged(ValueError):
    """What a decompressor raised."""


class _Guarded(io.RawIOBase):
    """A decompressing file whose every error is `_Damaged`, but for those of the system."""

    def __init__(self, file: Any):
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except OSError as error:
            if error.errno:  # of the system, which reads the compressed file
                raise
            raise _Damaged(one_line(error)) from None
        except Exception as error:  # zlib.error, EOFError, LZMAError, ZstdError, ArrowInvalid, …
            raise _Damaged(one_line(error)) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _guarded(file: Any) -> io.BufferedReader:
    return io.BufferedReader(_Guarded(file))


def _decompressor(raw: io.BufferedReader, compression: str, path: Path) -> io.BufferedReader:
    if compression == ".gz":
        return _guarded(gzip.GzipFile(fileobj=raw, mode="rb"))
    if compression == ".bz2":
        return _guarded(bz2.BZ2File(raw))
    if compression == ".xz":
        return _guarded(lzma.LZMAFile(raw))
    with contextlib.suppress(ImportError):
        from compression import zstd  # pyright: ignore[reportMissingImports] # of Python 3.14

        return _guarded(zstd.ZstdFile(raw))
    _check_zstd(path)
    import pyarrow

    return _guarded(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))


def read_text(path: Path, encoding: str) -> Iterator[str]:
    """The text of a file in blocks; a byte-order mark at its start is dropped, and nothing else altered.

    Args:
      path: a name such as `a.txt.gz` says that the file is compressed.
      encoding: of files that are neither UTF-8 nor begin with a byte-order mark; "": all must be UTF-8.

    Raises:
      ValueError: one line with what the file is, for what is no such text.
      OSError: the file cannot be read.
    """
    with open_binary(path) as file:
        head = _read(file, SAMPLE_BYTES)
        codec = _codec(path, head, encoding)
        decoder, offset, started, only_ascii = codecs.getincrementaldecoder(codec)(), 0, False, True
        blocks = itertools.chain([head] if head else [], iter(lambda: _read(file, BLOCK_BYTES), b""), [b""])
        for block in blocks:
            pending = decoder.getstate()[0] if block != head or offset else b""
            pending = pending if isinstance(pending, bytes) else b""
            try:
                text = decoder.decode(block, final=not block)
                text.encode()
            except ValueError as error:  # UnicodeError is one
                place = error.start if isinstance(error, UnicodeDecodeError) else 0
                data = pending + block
                more = data if len(data) > place + SAMPLE_BYTES else data + _read(file, SAMPLE_BYTES)
                where = offset - len(pending)
                raise _decoding_error(path, encoding, codec, more, where, place, only_ascii, error) from None
            if "\0" in text:
                raise ValueError(_nul_message(path, pending + block, offset - len(pending), codec))
            only_ascii = only_ascii and text.isascii()
            offset += len(block)
            if not started:
                text = text.lstrip("\ufeff")
                started = bool(text)
            if text:
                yield text


def _read(file: io.BufferedReader, size: int) -> bytes:
    """`size` bytes, fewer only at the end of the file."""
    parts, wanted = [], size
    while wanted and (part := file.read(wanted)):
        parts.append(part)
        wanted -= len(part)
    return b"".join(parts)


def _codec(path: Path, head: bytes, encoding: str) -> str:
    """The encoding to read a file in. Raises ValueError for what is no text, or of an encoding that was not asked."""
    if found := format_of(head):
        raise ValueError(f"{printable(path)} is {found[0]}; {format_remedy(path, found[1])}")
    found = bom_of(head)
    if found == "utf-8" or (found and encoding):
        return found
    wide = wide_encoding_of(head)
    if encoding:
        if _normalized(encoding) in ("utf-16", "utf-32"):
            return wide or ("utf-8" if _is_utf8(path) else encoding)
        return "utf-8" if not wide and _is_utf8(path, beyond_ascii=True) else encoding
    if found or wide:
        raise ValueError(_encoding_message(path, found or wide))
    return "utf-8"


def _normalized(encoding: str) -> str:
    return codecs.lookup(encoding).name


def _is_utf8(path: Path, beyond_ascii: bool = False) -> bool:
    """Whether all of a file is UTF-8 without NULs; with `beyond_ascii`, and has a character that ASCII lacks."""
    decoder, found = codecs.getincrementaldecoder("utf-8")(), not beyond_ascii
    with open_binary(path) as file:
        for block in itertools.chain(iter(lambda: _read(file, BLOCK_BYTES), b""), [b""]):
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError:
                return False
            if b"\0" in block:
                return False
            found = found or not block.isascii()
    return found


def format_remedy(path: Path, remedy: str, decompressed: bool = True) -> str:
    """What to do with a file of a known format; `remedy` is that of `format_of`.

    `decompressed`: of a compressed file the format is that of what is in it, not that of the file itself.
    """
    if "{file}" not in remedy:
        return remedy or "remove it, or move it elsewhere"
    compression = _suffixes(path)[1]
    suffix = remedy.rpartition("{file}")[2] if remedy.startswith("mv ") else ""
    new = path.with_name(f"{path.stem}.converted")
    if compression and decompressed and suffix != ".parquet":
        plain, command = path.with_suffix(suffix), f"decompress it: {COMPRESSED[compression]} -dc {quoted(path)} >"
        if plain == path:  # compressed twice
            return f"{command} {quoted(new)} && mv {quoted(new)} {quoted(path)}"
        return f"{command} {quoted(plain)} && rm {quoted(path)}"
    if suffix:
        new = path.with_name(path.name + suffix)
        if compression:
            new = path.with_suffix("").with_suffix(suffix + compression) if decompressed else path.with_suffix(suffix)
        return f"name it as what it is: mv {quoted(path)} {quoted(new)}"
    line = remedy.format(file=quoted(path), new=quoted(new))
    return f"convert it: {line} && mv {quoted(new)} {quoted(path)}"


def _encoding_message(path: Path, encoding: str, why: str = "") -> str:
    name = encoding.upper()
    return (
        f"{printable(path)} must be UTF-8, but is {name}{why}; set --config.corpus.encoding={encoding}, "
        f"or convert it: {_iconv(path, encoding)}"
    )


def _iconv(path: Path, encoding: str) -> str:
    """The command that makes UTF-8 of a file."""
    name = ICONV_NAMES.get(encoding, encoding.upper().replace("_", "-").replace("UTF-16-", "UTF-16"))
    name = re.sub(r"^ISO8859", "ISO-8859", name.replace("UTF-32-", "UTF-32"))
    compression = _suffixes(path)[1]
    if compression:
        plain = path.with_suffix("")
        return (
            f"{COMPRESSED[compression]} -dc {quoted(path)} | iconv -f {name} -t UTF-8 > {quoted(plain)} "
            f"&& rm {quoted(path)}"
        )
    new = path.with_name(f"{path.stem}.utf8")
    return f"iconv -f {name} -t UTF-8 {quoted(path)} > {quoted(new)} && mv {quoted(new)} {quoted(path)}"


def _decoding_error(
    path: Path, encoding: str, codec: str, data: bytes, start: int, place: int, only_ascii: bool, error: ValueError
) -> ValueError:
    """Why bytes are no text: `data` lies at `start` of the file, and fails at `place` in it."""
    name, at = printable(path), f"at offset {start + place}"
    byte = f"byte 0x{data[place]:02x} {at}" if place < len(data) else f"the end {at}"
    if codec != "utf-8":
        reason = error.reason if isinstance(error, UnicodeDecodeError) else one_line(error)
        return ValueError(
            f"{name} must be {encoding or codec}, as corpus.encoding says, but {byte} is not ({reason}); "
            f'set the right --config.corpus.encoding, or "" for UTF-8'
        )
    if is_binary(data[:SAMPLE_BYTES]) or b"\0" in data[max(0, place - 4096) : place + 4096]:
        return ValueError(f"{name} must be text, but is binary ({byte}); remove it or move it elsewhere")
    first = data[:place]
    line_start = first.rfind(b"\n") + 1
    if only_ascii and first.isascii() and (found := encoding_of(data[line_start : line_start + SAMPLE_BYTES])):
        return ValueError(_encoding_message(path, found, f" ({byte})"))
    new = path.with_name(f"{path.stem}.utf8")
    command = f"iconv -c -f UTF-8 -t UTF-8 {quoted(path)} > {quoted(new)}; mv {quoted(new)} {quoted(path)}"
    if compression := _suffixes(path)[1]:
        command = (
            f"{COMPRESSED[compression]} -dc {quoted(path)} | iconv -c -f UTF-8 -t UTF-8 "
            f"> {quoted(path.with_suffix(''))}; rm {quoted(path)}"
        )
    return ValueError(f"{name} must be UTF-8, but {byte} is not; correct it, or leave such bytes out: {command}")


def _nul_message(path: Path, data: bytes, start: int, codec: str) -> str:
    name, share = printable(path), data.count(0) / max(1, len(data))
    where = f"NUL at offset {start + max(0, data.find(0))}"
    if codec != "utf-8":
        return f"{name} is not {codec}: decoded so it holds a NUL ({where}); set the right --config.corpus.encoding"
    if (found := wide_encoding_of(data)) and not start:
        return _encoding_message(path, found)
    if share > 0.01 or is_binary(data.replace(b"\0", b"")):
        return f"{name} must be text, but is binary ({where}); remove it or move it elsewhere"
    new = path.with_name(f"{path.stem}.clean")
    command = f"tr -d '\\000' < {quoted(path)} > {quoted(new)} && mv {quoted(new)} {quoted(path)}"
    if compression := _suffixes(path)[1]:
        plain = path.with_suffix("")
        program = COMPRESSED[compression]
        command = f"{program} -dc {quoted(path)} | tr -d '\\000' > {quoted(plain)} && rm {quoted(path)}"
    return f"{name} must be text, but holds a {where}; leave such bytes out: {command}"


def lines(blocks: Iterable[str], max_chars: int = 1 << 28) -> Iterator[str]:
    """The lines of a text in blocks, with their ends; only "\\n" ends a line.

    A line longer than `max_chars` comes in parts, so that memory stays bounded.
    """
    parts: list[str] = []
    size = 0
    for block in blocks:
        *whole, rest = block.split("\n")
        for line in whole:
            parts.append(line)
            yield "".join(parts) + "\n"
            parts, size = [], 0
        if rest:
            parts.append(rest)
            size += len(rest)
            if size > max_chars:
                yield "".join(parts)
                parts, size = [], 0
    if parts:
        yield "".join(parts)


def one_line(error: BaseException) -> str:
    """The message of another library's error, in one short line."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    text = printable(text)
    return text if len(text) <= 200 else f"{text[:197]}..."
