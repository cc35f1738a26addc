"""Files and hub datasets → streams of documents. Only the current document is in memory, and no text is altered.

A *text* is a file of prose, or a row of a table. One that is long becomes several documents, its passages, which joined
are the text byte for byte. Where a passage ends depends on the words around that place alone, so that two printings of
a book are cut alike (as files are cut for storage in Muthitacharoen et al., "A Low-bandwidth Network File System", SOSP
2001). What cannot be read is an error of one line that names the file, the row in it, and what to do.
"""

import contextlib
import csv
import dataclasses
import itertools
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tale_jax.data.chat import CHAT_FIELD, COLUMNS, conversation, is_conversation
from tale_jax.data.encodings import format_of
from tale_jax.data.text_files import (
    SAMPLE_BYTES,
    TEXT_SUFFIXES,
    format_remedy,
    kind_of,
    lines,
    one_line,
    open_binary,
    printable,
    quoted,
    read_text,
)
from tale_jax.utils.extras import missing_extra

NUM_PASSAGES = 128  # a long text becomes about so many documents, so that every split of a single book gets some,
MIN_PASSAGE_BYTES, MAX_PASSAGE_BYTES = 2_048, 16_384  # unless they would be shorter or longer than about this
MAX_ROW_CHARS = 1 << 28  # of a row that is read into memory whole

_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_LINE_END = re.compile(rb"\n")
_NOT_WORDS = bytes(range(0x30)) + b":;<=>?@[\\]^_`{|}~\x7f"
_LOWER = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"abcdefghijklmnopqrstuvwxyz")
_QUOTES = re.compile(rb"\xe2\x80[\x80-\xbf]|\xc2[\xa0\xab\xbb]")  # quotes, dashes, no-break spaces in UTF-8


@dataclasses.dataclass(frozen=True)
class Cut:
    """How texts are cut: those up to `whole_bytes` not at all, others into passages of `min_bytes` or more."""

    whole_bytes: int = 32_000
    min_bytes: int = MIN_PASSAGE_BYTES


class Document(NamedTuple):
    """What BOS and EOS enclose, and the number of the text that it is, or is a passage of."""

    text: str
    text_index: int


def read_documents(files: Iterable[Path], field: str, encoding: str, cut: Cut) -> Iterator[Document]:
    """The documents of files, in order; blank ones are left out."""
    index = -1
    for path in files:
        for blocks in texts(path, field, encoding):
            index += 1
            if field == CHAT_FIELD:
                yield Document("".join(blocks), index)
                continue
            for passage in passages(blocks, cut):
                if not passage.isspace():
                    yield Document(passage, index)


def texts(path: Path, field: str, encoding: str) -> Iterator[Iterable[str]]:
    """The texts of a file, each in blocks: the file itself, or those called `field` in its rows."""
    kind = kind_of(path)
    if field == CHAT_FIELD and kind not in CHAT_SUFFIXES:
        raise ValueError(
            f"{printable(path)} must hold conversations, as the files before it do, or --config.corpus.field=messages "
            f"says, in rows of {', '.join(CHAT_SUFFIXES)}; move it elsewhere, or convert it"
        )
    if kind in TEXT_SUFFIXES:
        yield read_text(path, encoding)
    else:
        for text in ROWS[kind](path, field, encoding):
            if text := text.lstrip("\ufeff"):  # a row may have been a file with a byte-order mark
                yield [text]


def holds_conversations(path: Path, field: str, encoding: str) -> bool:
    """Whether the first row of a file is a conversation, and has no text called `field`."""
    names: Iterable[str] = ()
    try:
        if kind_of(path) == ".parquet":
            with _open_parquet(path) as table:
                names = table.schema_arrow.names
        elif kind_of(path) in CHAT_SUFFIXES:
            text = "".join(itertools.islice(read_text(path, encoding), 64)).lstrip("\ufeff[ \t\r\n")
            row, _ = _JSON.raw_decode(text)
            names = row if isinstance(row, dict) else ()
    except (ValueError, RecursionError, MemoryError, OSError):
        return False  # reading it will tell
    return field not in names and is_conversation(dict.fromkeys(names))


# Passages.


def passages(blocks: Iterable[str], cut: Cut) -> Iterator[str]:
    """A text as one document, or, when it is longer than `cut.whole_bytes`, in passages."""
    encoded = (block.encode() for block in blocks)
    head, size = [], 0  # so long that its passages have the greatest length in any case, or the whole text
    while size < NUM_PASSAGES * MAX_PASSAGE_BYTES and (block := next(encoded, None)) is not None:
        head.append(block)
        size += len(block)
    if not size:
        return
    target = 1 << max(1, size // NUM_PASSAGES).bit_length() - 1  # for texts of nearly one length the same
    target = size if size <= cut.whole_bytes else min(max(target, cut.min_bytes), MAX_PASSAGE_BYTES)
    if target == size:
        yield b"".join(head).decode()
        return
    for passage in split_passages(_drained(head, encoded), target):
        yield passage.decode()


def _drained(head: list[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    """All blocks; those of `head` are let go of."""
    head.reverse()
    while head:
        yield head.pop()
    yield from rest


def split_passages(blocks: Iterator[bytes], target: int) -> Iterator[bytes]:
    """Splits UTF-8 into passages of `target` / 2 to 2 * `target` bytes, but for the last.

    Each ends at a blank line, or else at a line end, space or character. Of several blank lines (or line ends) the one
    is taken that has the lowest hash of the words after it: behind a place where two texts differ, the cuts soon agree
    again. The passages depend on the text alone, not on the blocks that it comes in.
    """
    low, limit, start, buffer = max(1, target // 2), 2 * max(2, target), 0, b""
    while True:
        if len(buffer) - start <= limit + _CONTEXT_BYTES and (block := next(blocks, b"")):
            buffer, start = buffer[start:] + block, 0
            continue
        if start == len(buffer):
            return
        first, last = min(start + low, len(buffer)), min(start + limit, len(buffer))
        if len(buffer) - start <= target:
            end = len(buffer)
        else:
            end = _best(_BLANK_LINES, buffer, first, last) or _best(_LINE_END, buffer, first, last)
            end = end or (len(buffer) if last == len(buffer) else 0) or buffer.rfind(b" ", first, last) + 1 or last
        while end < len(buffer) and buffer[end] & 0xC0 == 0x80 and end > first:  # not inside a character
            end -= 1
        yield buffer[start:end]
        start = end


_CONTEXT_BYTES = 64  # after a boundary, of which the letters are hashed
_MAX_BOUNDARIES = 64  # that are compared for one passage


def _best(boundary: re.Pattern[bytes], buffer: bytes, low: int, high: int) -> int:
    """The end of the boundary in [low, high) with the lowest hash of what follows; 0 without one."""
    matches = itertools.islice(boundary.finditer(buffer, low, high), _MAX_BOUNDARIES)
    ends = (match.end() for match in matches if match.end() < len(buffer))
    return min(((_hash(buffer[end : end + _CONTEXT_BYTES]), end) for end in ends), default=(0, 0))[1]


def _hash(context: bytes) -> int:
    return zlib.crc32(words_only(context)[:24])


def words_only(data: bytes) -> bytes:
    """UTF-8 text without white space, punctuation and (of ASCII) capitals: what two printings of a text share."""
    if b"\xe2\x80" in data or b"\xc2" in data:
        data = _QUOTES.sub(b"", data)
    return data.translate(_LOWER, _NOT_WORDS)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Joins WikiText's lines into articles. One starts at ` = Title = ` between blank lines: without the blank lines,
    29 rows of tables in WikiText-2 would look like titles."""
    article: list[str] = []
    for line in lines:
        if len(article) > 2 and not line.strip() and _is_title(article[-1]) and not article[-2].strip():
            title = article.pop()
            yield "".join(article)
            article = [title]
        article.append(line)
    if article:
        yield "".join(article)


def _is_title(line: str) -> bool:
    words = line.split(" ")  # "", "=", title ..., "=", "\n"
    return words[:2] == ["", "="] and words[-2] == "=" and "=" not in (words[2], words[-3]) and len(words) > 4


def stories(blocks: Iterable[str], separator: str = "<|endoftext|>") -> Iterator[str]:
    """The texts between separators, as TinyStories is published, without the white space around them."""
    rest = ""
    for block in _chain_text(blocks, separator):
        *whole, rest = (rest + block).split(separator)
        for story in whole:
            if text := story.strip():
                yield text


def _chain_text(blocks: Iterable[str], last: str) -> Iterator[str]:
    yield from blocks
    yield last


# Rows.


def json_lines(path: Path, field: str, encoding: str) -> Iterator[str]:
    """The texts called `field` of a file with one JSON object a line; empty ones are left out."""
    for number, line in enumerate(lines(read_text(path, encoding), MAX_ROW_CHARS), 1):
        location = f"{printable(path)} line {number}"
        if not line.strip():
            continue
        try:
            row = _JSON.decode(line)
        except (ValueError, RecursionError, MemoryError) as error:
            hint = "; a .json file must be an array of rows, or one object a line" if kind_of(path) == ".json" else ""
            raise ValueError(
                f"{location} must be a JSON object ({one_line(error)}); {_remove_line(path, number)}{hint}"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{location} must be a JSON object, not {_json_kind(row)}; give one object a line")
        yield from _row_text(row, field, location)


def json_array(path: Path, field: str, encoding: str) -> Iterator[str]:
    """The same for a file that is one JSON array of objects, or of the texts themselves; or else for JSON lines."""
    blocks = read_text(path, encoding)
    buffer = ""
    for buffer in blocks:
        if buffer := buffer.lstrip():
            break
    if not buffer.startswith("["):
        yield from json_lines(path, field, encoding)
        return
    buffer, number, after_comma = buffer[1:], 0, False
    while True:
        buffer, at_end = buffer.lstrip(), False
        while not buffer and not at_end:
            block = next(blocks, None)
            buffer, at_end = (block or "").lstrip(), block is None
        location = f"{printable(path)} row {number + 1}"
        if at_end:
            raise ValueError(f"{location}: the array must end with ]; download the file again, or correct its end")
        if buffer[0] == "]" and not after_comma:
            if buffer[1:].strip() or any(block.strip() for block in blocks):
                raise ValueError(f"{printable(path)} must hold one array, but has more after it; remove that")
            return
        if number and not after_comma:
            if buffer[0] != ",":
                raise ValueError(f"{location} must follow a comma; correct the file")
            buffer, after_comma = buffer[1:], True
            continue
        row, buffer = _next_row(buffer, blocks, location)
        number, after_comma = number + 1, False
        if isinstance(row, str):
            row = {field: row}
        if row is None:
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{location} must be a JSON object or text, not {_json_kind(row)}; correct or remove it")
        yield from _row_text(row, field, location)


def _next_row(buffer: str, blocks: Iterator[str], location: str) -> tuple[Any, str]:
    """The JSON value that `buffer` begins with, and what follows it; more blocks are read while it is not whole."""
    while True:
        try:
            row, end = _JSON.raw_decode(buffer)
            return row, buffer[end:]
        except (ValueError, RecursionError, MemoryError) as error:
            wanted, parts = len(buffer), []  # twice as much as before: not tried again at each block
            while (
                wanted > 0
                and len(buffer) < MAX_ROW_CHARS
                and isinstance(error, ValueError)
                and (block := next(blocks, ""))
            ):
                parts.append(block)
                wanted -= len(block)
            if not parts:
                raise ValueError(f"{location} must be JSON ({one_line(error)}); correct or remove it") from None
            buffer += "".join(parts)


def csv_rows(path: Path, field: str, encoding: str) -> Iterator[str]:
    """The texts in column `field` of a table with the names of the columns in its first line, but for empty ones."""
    location = printable(path)
    table_lines = _csv_lines(read_text(path, encoding))
    header = next(table_lines, "")
    delimiter = _delimiter(header, field, "\t" if kind_of(path) == ".tsv" else ",")
    csv.field_size_limit(MAX_ROW_CHARS // 4)
    reader = csv.reader(_chain_text_first(header, table_lines), delimiter=delimiter, strict=True)
    names: list[str] = []
    column, start = -1, 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{location} line {start} must be a row ({one_line(error)}); close its quotes, and write a quote that "
                "stands inside quotes twice"
            ) from None
        if row is None:
            return
        place, start = f"{location} line {start}", reader.line_num + 1
        if not row:
            continue
        if column < 0:
            names = [name.strip() for name in row]
            if field not in names:
                raise ValueError(_missing_field(field, place, names))
            column = names.index(field)
            continue
        if len(row) != len(names):
            raise ValueError(
                f"{place} must have {len(names)} columns, as the first line has, but has {len(row)}; put quotes around "
                f"a text with {_DELIMITER_NAMES[delimiter]} in it, or remove the row"
            )
        if row[column].strip():
            yield row[column]


_DELIMITER_NAMES = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}
_CSV_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def _csv_lines(blocks: Iterable[str]) -> Iterator[str]:
    """Lines however they end: with the line ends of Unix, Windows or old Macs."""
    for line in lines(blocks, MAX_ROW_CHARS):
        yield from _CSV_LINE.findall(line) if "\r" in line else [line]


def _chain_text_first(first: str, rest: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _delimiter(header: str, field: str, usual: str) -> str:
    """The character between columns: the one that finds `field` in the header, else the usual one."""
    for delimiter in (usual, *_DELIMITER_NAMES):
        if field in [name.strip().strip('"') for name in header.strip().split(delimiter)] and delimiter in header:
            return delimiter
    return usual


def parquet_rows(path: Path, field: str, encoding: str = "") -> Iterator[str]:
    """The texts in column `field`, 256 rows in memory at a time; empty ones are left out."""
    del encoding  # parquet is UTF-8
    name = printable(path)
    with _open_parquet(path) as table:
        names, row = list(table.schema_arrow.names), 0
        chosen = [known for known in names if known in COLUMNS] if field == CHAT_FIELD else [field]
        if field not in names and not (field == CHAT_FIELD and is_conversation(dict.fromkeys(names))):
            raise ValueError(_missing_field(field, name, names))
        batches = table.iter_batches(batch_size=256, columns=chosen)
        while True:
            try:
                batch = next(batches, None)
                columns = [batch.column(number) for number in range(batch.num_columns)] if batch is not None else []
            except Exception as error:
                raise ValueError(
                    f"{name} is damaged after row {row} ({one_line(error)}); download or write it again"
                ) from None
            if batch is None:
                return
            for values in zip(*columns, strict=True):
                row += 1
                try:
                    read = {known: value.as_py() for known, value in zip(batch.schema.names, values, strict=True)}
                except Exception as error:
                    raise ValueError(
                        f"{name} row {row}: {field} cannot be read ({one_line(error)}); write the file again without it"
                    ) from None
                yield from _row_text(read, field, f"{name} row {row}")


@contextlib.contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    """A parquet file, opened. Raises ValueError, in one line, where it is none or the library is missing."""
    name = printable(path)
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(missing_extra(f"corpus.path={name}", "pyarrow", "hub")) from None
    with open_binary(path) as packed, tempfile.TemporaryFile() as temporary:
        file: Any = packed
        if path.suffix.lower() != ".parquet":  # compressed as a whole, and read from its end
            shutil.copyfileobj(packed, temporary)
            temporary.seek(0)
            file = temporary
        head = file.read(SAMPLE_BYTES)
        file.seek(0)
        if not head.startswith(b"PAR1"):
            what, remedy = format_of(head) or ("not a parquet file", "download or write it again")
            raise ValueError(f"{name} must be a parquet file, but is {what}; {format_remedy(path, remedy)}")
        try:
            table = parquet.ParquetFile(file)
            table.schema_arrow  # noqa: B018  (read here, where its errors are told)
        except Exception as error:  # pyarrow raises errors of many kinds for damaged files
            raise ValueError(f"{name} must be a parquet file ({one_line(error)}); download or write it again") from None
        yield table


ROWS = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_array,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
}


@dataclasses.dataclass(frozen=True)
class HubRows:
    """The texts called `field` in one split of a dataset on the Hugging Face hub; "" is the default configuration."""

    name: str
    config: str
    split: str
    field: str

    def __post_init__(self) -> None:
        try:
            import datasets  # noqa: F401
        except ImportError:
            what = f"dataset {self.name} on the Hugging Face hub"
            raise ValueError(f"{missing_extra(what, 'datasets', 'hub')}, or download it and set corpus.path") from None

    def __iter__(self) -> Iterator[str]:
        location = f"dataset {self.name}{f' ({self.config})' if self.config else ''}, split {self.split}"
        return (_field_text(row, self.field, location) for row in self._rows(location))

    def _rows(self, location: str) -> Iterator[dict[str, Any]]:
        import datasets

        try:
            yield from datasets.load_dataset(self.name, self.config or None, split=self.split, streaming=True)
        except ValueError as error:  # an unknown split or configuration
            raise ValueError(f"{location}: {one_line(error)}; see corpus.hub_config and corpus.*_split") from None
        except (OSError, RuntimeError) as error:  # nearly all that the network and the hub's client raise
            raise ValueError(
                f"{location} cannot be read ({type(error).__name__}: {one_line(error)}); "
                "check its name and the network, or download it and set corpus.path"
            ) from None


CHAT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")

_JSON = json.JSONDecoder(parse_int=float)  # int refuses what has thousands of digits
_JSON_KINDS = {bool: "true or false", float: "a number", int: "a number", list: "an array", dict: "an object"}


def _json_kind(value: Any) -> str:
    return "null" if value is None else _JSON_KINDS.get(type(value), f"of type {type(value).__name__}")


def _remove_line(path: Path, number: int) -> str:
    if kind_of(path) != path.suffix.lower():
        return "correct or remove it"
    new = path.with_name(f"{path.stem}.clean")
    return f"correct or remove it: sed {number}d {quoted(path)} > {quoted(new)} && mv {quoted(new)} {quoted(path)}"


def _row_text(row: dict[str, Any], field: str, location: str) -> Iterator[str]:
    """The text called `field` of a row, unless it is empty; or a conversation."""
    if field == CHAT_FIELD:
        yield conversation(row, location)
        return
    text = _field_text(row, field, location)
    try:
        text.encode()
    except UnicodeEncodeError:  # possible in JSON as \ud83d
        raise ValueError(f"{location}: {field} must not hold half a surrogate pair; correct or remove it") from None
    if text.strip():
        yield text


def _field_text(row: dict[str, Any], field: str, location: str) -> str:
    if field not in row:
        raise ValueError(_missing_field(field, location, row))
    if row[field] is not None and not isinstance(row[field], str):
        kind = _json_kind(row[field])
        raise ValueError(f"corpus.field={field} must be text, but is {kind} in {location}; name another field")
    return row[field] or ""


def _missing_field(field: str, location: str, names: Iterable[str]) -> str:
    known = printable(", ".join(str(name) for name in names))
    known = known if len(known) <= 200 else f"{known[:197]}..."
    return f"corpus.field={field} is not in {location}, which has {known or 'no field'}; name one of these"
