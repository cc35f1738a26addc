"""Files read as the library of the format reads them; hostile ones are refused in one line, before memory is asked."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tale_jax.convert import safetensors_files
from tale_jax.convert.safetensors_files import open_safetensors, read_header, write_safetensors

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs the convert extra")
HUGE = 1 << 62


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal(7).astype(np.float16),
        "c": rng.standard_normal((2, 1, 4)).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 3), np.float32),
    }


def test_what_is_written_is_read_by_us_and_by_the_library(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", arrays())
    tensors = open_safetensors(tmp_path)
    assert tensors.shapes == {name: array.shape for name, array in arrays().items()}
    for name, array in arrays().items():
        found = tensors.read(name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, array.astype(np.float32))
    write_safetensors(tmp_path / "model.safetensors", {"a": arrays()["a"]})
    np.testing.assert_array_equal(safetensors_numpy.load_file(tmp_path / "model.safetensors")["a"], arrays()["a"])


def test_shards_are_found_by_their_index(tmp_path):
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}}
    write_safetensors(tmp_path / "one.safetensors", {"a": arrays()["a"]})
    write_safetensors(tmp_path / "two.safetensors", {name: arrays()[name] for name in "bc"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = open_safetensors(tmp_path)
    np.testing.assert_array_equal(tensors.read("c"), arrays()["c"].astype(np.float32))
    assert set(tensors.shapes) == set("abc")


def file_of(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: object, begin: object, end: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "part"),
    [
        ({"a": entry([2], 0, 8)}, b"x" * 4, "its tensors end at byte"),
        ({"a": entry([2], 0, 8)}, b"x" * 9, "its tensors end at byte"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"x" * 12, "b overlaps a"),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, b"x" * 8, "overlaps"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, b"x" * 20, "b leaves a gap after a"),
        ({"a": entry([HUGE, HUGE], 0, 8)}, b"x" * 8, "not those of shape"),
        ({"a": entry([HUGE, 4], 0, 0)}, b"", "not those of shape"),
        ({"a": entry([-2], 0, 8)}, b"x" * 8, "no numbers"),
        ({"a": entry([-2, -1], 0, 8)}, b"x" * 8, "no numbers"),
        ({"a": entry([2.0], 0, 8)}, b"x" * 8, "no numbers"),
        ({"a": entry([True], 0, 4)}, b"x" * 4, "no numbers"),
        ({"a": entry([1] * 4000, 0, 4)}, b"x" * 4, "no numbers"),
        ({"a": entry([2], -8, 0)}, b"x" * 8, "no numbers"),
        ({"a": entry([2], 8, 0)}, b"x" * 8, "not those of shape"),
        ({"a": entry([2], 0, HUGE)}, b"x" * 8, "not those of shape"),
        ({"a": entry("2", 0, 8)}, b"x" * 8, "no numbers"),
        ({"a": entry(None, 0, 8)}, b"x" * 8, "lacks dtype, shape or data_offsets"),
        ({"a": entry([2], 0, 8, "F33")}, b"x" * 8, "has dtype F33"),
        ({"a": entry([2], 0, 8, None)}, b"x" * 8, "has dtype None"),
        ({"a": {"dtype": "F32"}}, b"", "lacks dtype, shape or data_offsets"),
        ({"a": 3}, b"", "lacks dtype, shape or data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"x" * 4, "lacks dtype, shape"),
        ([1], b"", "its header is not a JSON object"),
        (b"{", b"", "its header is not JSON"),
        (b"[" * 100_000, b"", "its header is not JSON"),
        (b"\xff\xfe", b"", "its header is not JSON"),
        ({"x" * 500 + "\n": entry([2], 0, 4)}, b"x" * 4, "bytes, not those"),
    ],
)
def test_a_file_that_is_not_sound(tmp_path, header, data, part):
    path = file_of(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ValueError, match="is not a sound safetensors file") as caught:
        read_header(path)
    message = str(caught.value)
    assert part in message and len(message.splitlines()) == 1 and len(message) < 400 + len(str(path))
    write_safetensors(path, arrays())  # downloaded again
    assert set(read_header(path)) == set(arrays())


@pytest.mark.parametrize("length", [100, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_the_file(tmp_path, monkeypatch, length):
    path = file_of(tmp_path / "model.safetensors", {}, length=length)
    with pytest.raises(ValueError, match=r"a header of .* bytes in a file of"):
        read_header(path)
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"a header of .* bytes in a file of 3"):
        read_header(path)
    monkeypatch.setattr(safetensors_files, "MAX_HEADER", 8)
    write_safetensors(path, arrays())
    with pytest.raises(ValueError, match=r"bytes, more than 8"):
        read_header(path)
    monkeypatch.undo()
    assert set(read_header(path)) == set(arrays())


def test_a_truncated_file(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", arrays())
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not a sound safetensors file"):
            open_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ({"weight_map": {"a": "../one.safetensors"}}, "no file beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "no file beside it"),
        ({"weight_map": {"a": "gone.safetensors"}}, "lacks the shard gone.safetensors"),
        ({"weight_map": {"b": "one.safetensors"}}, "lacks b, which"),
        ({"weight_map": {"a": 3}}, "weight_map"),
        ({"weight_map": {"a": []}}, "weight_map"),
        ({"weight_map": 3}, "weight_map"),
        ({}, "weight_map"),
        (None, "must hold model.safetensors, or"),
    ],
)
def test_an_index_that_is_not_sound(tmp_path, index, part):
    write_safetensors(tmp_path / "one.safetensors", {"a": arrays()["a"]})
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"safetensors") as caught:
        open_safetensors(tmp_path)
    assert part in str(caught.value) and len(str(caught.value).splitlines()) == 1
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    assert set(open_safetensors(tmp_path).shapes) == {"a"}


def test_numbers_that_are_no_weights(tmp_path):
    safetensors_numpy.save_file({"a": np.arange(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a has dtype I64 and must have one of F32, F16, BF16; convert it"):
        open_safetensors(tmp_path).read("a")
    safetensors_numpy.save_file({"a": np.arange(3, dtype=np.float16)}, tmp_path / "model.safetensors")
    assert open_safetensors(tmp_path).read("a").tolist() == [0, 1, 2]
