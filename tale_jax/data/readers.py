"""Files and hub datasets → streams of documents. Only the current document is in memory, and no text is altered.

The passages of a text file and the articles of a WikiText file, joined, are the file byte for byte. Text that cannot be
read is an error of one line that names the file, the position in it, and what to do.
"""

import dataclasses
import glob
import io
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20  # read at once
MAX_WHOLE_BYTES = 32_000  # a text file up to this size is one document
NUM_PASSAGES = 128  # a longer one becomes about so many documents, so that every split of a single book gets some,
MIN_PASSAGE_BYTES, MAX_PASSAGE_BYTES = 2_000, 16_000  # unless they would be shorter or longer than about this

_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_log = logging.getLogger(__name__)


def find_files(pattern: str) -> list[Path]:
    """The files of a file, folder (recursive) or glob, sorted by name; empty ones are left out with a warning."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        paths = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    elif path.is_file():
        paths = [path]
    else:
        paths = [Path(name) for name in glob.glob(str(path), recursive=True)]
        if not paths:
            raise ValueError(f"corpus.path={pattern} does not exist; give a file, a folder or a glob")
    paths = sorted(p for p in paths if p.suffix.lower() in (".txt", ".jsonl", ".parquet") and p.is_file())
    if not paths:
        raise ValueError(f"corpus.path={pattern} must hold .txt, .jsonl or .parquet files; rename or convert them")
    for file in paths:
        if not file.stat().st_size:
            _log.warning("%s is empty and is left out", file)
    files = [file for file in paths if file.stat().st_size]
    if not files:
        raise ValueError(f"corpus.path={pattern} must hold a file that is not empty; give one with text")
    return files


def read_file(path: Path, field: str) -> Iterator[str]:
    """The documents of a .txt file, or the texts called `field` in a .jsonl or .parquet file."""
    if path.suffix.lower() == ".txt":
        return passages(path)
    return json_rows(path, field) if path.suffix.lower() == ".jsonl" else parquet_rows(path, field)


def passages(path: Path) -> Iterator[str]:
    """A text file as one document, or, when it is longer than `MAX_WHOLE_BYTES`, split at blank lines."""
    size = path.stat().st_size
    usual = min(max(size // NUM_PASSAGES, MIN_PASSAGE_BYTES), MAX_PASSAGE_BYTES)
    target = size if size <= MAX_WHOLE_BYTES else usual
    offset = 0
    with path.open("rb") as file:
        for passage in split_passages(file, target):
            yield decode(passage, path, offset)
            offset += len(passage)


def split_passages(file: io.BufferedIOBase, target: int) -> Iterator[bytes]:
    """Splits a file at the first blank line after `target` bytes, or else at the last line end, space or character
    before 4 * target. The passages depend on the file alone, not on the blocks that it is read in."""
    limit, start, buffer = 4 * target, 0, b""
    while True:
        if len(buffer) - start <= limit and (block := file.read(BLOCK_BYTES + limit)):
            buffer, start = buffer[start:] + block, 0
            continue
        if start == len(buffer):
            return
        low, high = min(start + target, len(buffer)), min(start + limit, len(buffer))
        if blank := _BLANK_LINES.search(buffer, low, high):
            end = blank.end()
        elif high == len(buffer):
            end = high
        else:
            end = buffer.rfind(b"\n", low, high) + 1 or buffer.rfind(b" ", low, high) + 1 or high
            while buffer[end] & 0xC0 == 0x80 and end > low:  # a continuation byte: not inside a character
                end -= 1
        yield buffer[start:end]
        start = end


def lines(path: Path) -> Iterator[str]:
    """The lines of a file, with their ends."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield decode(line, path, offset)
            offset += len(line)


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


def stories(path: Path, separator: bytes = b"<|endoftext|>") -> Iterator[str]:
    """The texts between separators, as TinyStories is published, without the white space around them."""
    offset, rest = 0, b""
    with path.open("rb") as file:
        for block in itertools.chain(iter(lambda: file.read(BLOCK_BYTES), b""), [separator]):
            *whole, rest = (rest + block).split(separator)
            for story in whole:
                if text := decode(story, path, offset).strip():
                    yield text
                offset += len(story) + len(separator)


def json_rows(path: Path, field: str) -> Iterator[str]:
    """The texts called `field` of a file with one JSON object a line; empty ones are left out."""
    for number, line in enumerate(lines(path), 1):
        location = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{location} must be a JSON object ({error}); correct or remove it") from None
        if not isinstance(row, dict):
            raise ValueError(f"{location} must be a JSON object, not a {type(row).__name__}; give one object a line")
        text = _field_text(row, field, location)
        try:
            text.encode()
        except UnicodeEncodeError:  # possible in JSON as \ud83d
            raise ValueError(f"{location}: {field} must not hold half a surrogate pair; correct or remove it") from None
        if text.strip():
            yield text


def parquet_rows(path: Path, field: str) -> Iterator[str]:
    """The texts in column `field`, 256 rows in memory at a time; empty ones are left out."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"corpus.path={path} needs pyarrow to be read; pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise ValueError(_missing_field(field, str(path), file.schema_arrow.names))
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                yield from filter(str.strip, (_field_text(row, field, str(path)) for row in batch.to_pylist()))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} must be a parquet file ({one_line(error)}); download or write it again") from None


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
            raise ValueError(
                f"dataset {self.name} on the Hugging Face hub needs the library datasets to be read; "
                'pip install "tale_jax[hub]", or download it and set corpus.path'
            ) from None

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


def decode(data: bytes, path: Path, offset: int) -> str:
    """UTF-8 → text; `offset` is the position of `data` in its file, for the error message."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8, but byte 0x{data[error.start]:02x} at offset {offset + error.start} is not; "
            "convert the file (iconv -f latin1 -t utf-8) or remove it"
        ) from None


def one_line(error: Exception) -> str:
    """The message of another library's error, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _field_text(row: dict[str, Any], field: str, location: str) -> str:
    if field not in row:
        raise ValueError(_missing_field(field, location, row))
    if row[field] is not None and not isinstance(row[field], str):
        kind = type(row[field]).__name__
        raise ValueError(f"corpus.field={field} must be text, but is of type {kind} in {location}; name another field")
    return row[field] or ""


def _missing_field(field: str, location: str, names: Iterable[str]) -> str:
    return f"corpus.field={field} is not in {location}, which has {', '.join(names) or 'no field'}; name one of these"
