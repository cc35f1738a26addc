"""Reads `.safetensors` files that nobody vouches for, and writes our own.

A file is eight bytes, the length of a header; the header, a JSON object that gives each tensor its dtype, its shape and
where its bytes lie; and the bytes. Everything the header says is checked against the size of the file before any memory
is asked for: a header longer than the file, tensors that overlap or leave gaps, shapes that are absurd or do not fit
their bytes. Tensors are then read one at a time, through a memory map.

    with open_safetensors(folder) as tensors:  # one file, or the shards of an index
        tensors.shapes["model.norm.weight"], tensors.read("model.norm.weight")
    write_safetensors(path, {"model.norm.weight": array})
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from tale_jax.utils.extras import missing_extra
from tale_jax.utils.files import check_length

MAX_HEADER = 100_000_000  # bytes, as the library of the format has it
MAX_RANK = 8
MAX_JSON_BYTES = 1 << 28  # of a file beside the weights; tokenizers of 250,000 tokens have 33 MB
READABLE = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SIZES |= {"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `start` counts bytes from the beginning of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Tensors:
    """The tensors of one or several files by name. `shapes` is known before anything is read."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """A tensor in float32. Raises ValueError, in one line, for a dtype that weights do not have."""
        tensor = self._tensors[name]
        if tensor.dtype not in READABLE:
            known = ", ".join(READABLE)
            raise ValueError(f"{tensor.path}: {name} has dtype {tensor.dtype} and must have one of {known}; convert it")
        raw = np.memmap(tensor.path, np.uint8, "r", tensor.start, (tensor.size,)) if tensor.size else np.empty(0, "u1")
        return raw.view(READABLE[tensor.dtype]).reshape(tensor.shape).astype(np.float32)


def open_safetensors(folder: Path) -> Tensors:
    """What `model.safetensors` holds, or the shards that `model.safetensors.index.json` names.

    Raises ValueError, in one line, when there is neither, or a file is not sound.
    """
    if (folder / SINGLE).is_file():
        return Tensors(read_header(folder / SINGLE))
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} must hold {SINGLE}, or {INDEX} and its shards; download them again")
    check_length(folder / INDEX, MAX_JSON_BYTES)
    try:
        shard_of = json.loads((folder / INDEX).read_bytes())["weight_map"]
        shards = sorted(set(shard_of.values()))
        if not all(isinstance(shard, str) for shard in shards):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f'{folder / INDEX} must have a "weight_map" of names to shards; download it again') from None
    found: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise ValueError(f"{folder / INDEX} names the shard {shard!r}, which is no file beside it; do not use it")
        if not (folder / shard).is_file():
            raise ValueError(f"{folder} lacks the shard {shard} that {INDEX} names; download it again")
        held = read_header(folder / shard)
        found |= {name: tensor for name, tensor in held.items() if shard_of.get(name) == shard}
    if lost := set(shard_of) - set(found):
        name = min(lost)
        raise ValueError(f"{folder} lacks {name}, which {INDEX} places in {shard_of[name]}; download it again")
    return Tensors(found)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises ValueError, in one line, when the file is not sound."""
    try:
        return _read_header(path)
    except _Unsound as error:
        raise ValueError(f"{path} is not a sound safetensors file ({error}); download it again") from None


class _Unsound(Exception):
    pass


def _read_header(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > size - 8:
            raise _Unsound(f"a header of {length:,} bytes in a file of {size:,}")
        if length > MAX_HEADER:
            raise _Unsound(f"a header of {length:,} bytes, more than {MAX_HEADER:,}")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise _Unsound("its header is not JSON") from None
    if not isinstance(header, dict):
        raise _Unsound("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _read_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    end, before = 8 + length, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if tensor.start != end:
            what = "overlaps" if tensor.start < end else "leaves a gap after"
            raise _Unsound(f"{_short(name)} {what} {_short(before)}")
        end, before = tensor.start + tensor.size, name
    if end != size:
        raise _Unsound(f"its tensors end at byte {end:,} of {size:,}")
    return tensors


def _read_entry(path: Path, name: str, entry: Any, base: int) -> Tensor:
    """What the header says of one tensor."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _Unsound(f"{_short(name)} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise _Unsound(f"{_short(name)} has dtype {_short(str(dtype))}, which is not known")
    if len(shape) > MAX_RANK or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise _Unsound(f"{_short(name)} has a shape or offsets that are no numbers")
    if end - begin != math.prod(shape) * SIZES[dtype]:
        raise _Unsound(f"{_short(name)} has {end - begin:,} bytes, not those of shape {_short(str(list(shape)))}")
    return Tensor(path, dtype, shape, base + begin, end - begin)


def _short(text: str) -> str:
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of float32, float16 or bfloat16 under their names."""
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise ValueError(missing_extra("--to=huggingface", "safetensors", "convert")) from None
    save_file(dict(arrays), path, metadata={"format": "pt"})  # transformers wants to be told: it has no "np"
    path.chmod(0o644)  # the library gives it to its owner alone
