"""A folder with a manifest: whatever happens to a file of it is found and named."""

import hashlib
import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tale_jax.utils.manifests import (
    MANIFEST,
    SumsAhead,
    bad_files,
    check_manifest,
    digest_of,
    hash_file,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "5"
    (folder / "params" / "d").mkdir(parents=True)
    (folder / "params" / "d" / "0").write_bytes(bytes(range(256)) * 20)
    (folder / "data").mkdir()
    (folder / "data" / "position").write_text("12")
    (folder / "empty").touch()
    write_manifest(folder, {"step": 5})
    return folder


def test_a_whole_folder_is_good_and_says_its_facts(folder):
    assert check_manifest(folder)["step"] == 5
    assert set(read_manifest(folder)["files"]) == {"params/d/0", "data/position", "empty"}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


CHANGES = {
    "flipped": (lambda f: flip(f / "params/d/0"), "params/d/0 is damaged"),
    "truncated": (lambda f: os.truncate(f / "params/d/0", 100), "params/d/0 has 100 bytes instead of 5120"),
    "appended": (lambda f: (f / "empty").write_text("x"), "empty has 1 bytes instead of 0"),
    "deleted": (lambda f: (f / "data/position").unlink(), "data/position is missing"),
    "added": (lambda f: (f / "data/more").touch(), "data/more is not in its manifest"),
    "linked": (lambda f: ((f / "empty").unlink(), (f / "empty").symlink_to("/dev/null")), "empty"),
    "linked folder": (lambda f: (f / "more").symlink_to("/etc"), "more is not in its manifest"),
    "manifest flipped": (lambda f: flip(f / MANIFEST), f"{MANIFEST} is damaged"),
    "manifest cut": (lambda f: os.truncate(f / MANIFEST, 30), f"{MANIFEST} is damaged"),
    "manifest emptied": (lambda f: os.truncate(f / MANIFEST, 0), f"{MANIFEST} is damaged"),
    "manifest deleted": (lambda f: (f / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    "manifest deep": (lambda f: (f / MANIFEST).write_text("[" * 100_000), f"{MANIFEST} is damaged"),
    "manifest huge": (lambda f: os.truncate(f / MANIFEST, 1 << 30), f"{MANIFEST} is too large"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_found_and_named(folder, name):
    change, said = CHANGES[name]
    change(folder)
    with pytest.raises(ValueError, match=said) as caught:
        check_manifest(folder)
    assert "\n" not in str(caught.value)


def test_only_what_is_read_is_looked_at(folder):
    flip(folder / "params/d/0")
    check_manifest(folder, only={"data"})
    assert list(bad_files(folder, read_manifest(folder), only={"params"})) == ["params/d/0 is damaged"]


def test_a_manifest_cannot_point_out_of_its_folder(folder):
    content = {"files": {"../x": ["0" * 64, 1]}, "step": 5}
    (folder / MANIFEST).write_text(json.dumps(content | {"sha256": digest_of(content)}))
    with pytest.raises(ValueError, match="damaged"):
        read_manifest(folder)


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_any_content_is_a_manifest_or_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    (folder / MANIFEST).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=MANIFEST):
        read_manifest(folder)


def test_a_digest_is_that_of_the_whole_file_in_any_blocks(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(content := bytes(range(256)) * 5)
    for block in (7, 1280, 1 << 20):
        monkeypatch.setattr("tale_jax.utils.manifests.BLOCK", block)
        assert hash_file(tmp_path / "file") == (hashlib.sha256(content).hexdigest(), len(content))


def test_sums_taken_while_files_are_written_are_those_at_the_end(tmp_path):
    folder = tmp_path / "100.tmp"
    (folder / "a").mkdir(parents=True)
    names = [f"a/{number}" for number in range(4)]
    sums = SumsAhead(lambda: tmp_path.glob("100*"))
    for number, name in enumerate(names):
        (folder / name).write_bytes(bytes([number]) * 3_000_000)
    while len(sums.known) < len(names):
        time.sleep(0.01)
    folder = folder.rename(tmp_path / "100")
    (folder / names[0]).write_bytes(b"x" * 3_000_000)  # as long as before
    (folder / "new").write_bytes(b"y")
    known = sums.stop()
    write_manifest(folder, {}, known)
    check_manifest(folder)
    assert {read_manifest(folder)["files"][name][0] for name in names[1:]} <= set(known.values())
    status = (folder / "new").stat()
    state = (status.st_ino, status.st_size, status.st_mtime_ns)
    assert hash_file(folder / "new", known={state: "as it was"}) == ("as it was", 1)
    (folder / "new").write_bytes(b"yz")
    assert hash_file(folder / "new", known={state: "as it was"})[0] == hashlib.sha256(b"yz").hexdigest()
