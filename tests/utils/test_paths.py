"""Paths as people give them: what is expanded, what is refused and why, for any name that a file system allows."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tale_jax.utils.paths import KINDS, expanded, fault_of, printable_path

NAMES = st.binary(min_size=1, max_size=60).map(lambda name: os.fsdecode(name.replace(b"/", b"_").replace(b"\0", b"_")))


def test_a_home_is_expanded_only_at_the_start(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    assert expanded("~", "--out") == Path("/users/me")
    assert expanded("~/runs/one/", "--out") == Path("/users/me/runs/one")
    assert expanded("runs/~", "--out") == Path("runs/~")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "--out= must name a file or folder"),
        (" \t", "must name a file or folder"),
        ("a\0b", "must not hold a NUL"),
        ("~no_such_user_here/x", "there is no user no_such_user_here"),
    ],
)
def test_paths_that_mean_nothing(path, words):
    with pytest.raises(ValueError, match=words):
        expanded(path, "--out")


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("file", "folder", "it is a file"),
        ("file", "folder to write", "it is a file"),
        ("folder", "file", "it is a folder"),
        ("folder", "file to write", "it is a folder"),
        ("none", "folder", "does not exist"),
        ("none", "file", "does not exist"),
        ("file/x", "folder to write", "a part of it is a file"),
        ("file/x/y", "file to write", "a part of it is a file"),
        ("file/x", "file", "a part of it is a file"),
        ("x" * 300, "folder to write", "give a shorter name"),
        ("new/" + "x" * 300, "file to write", "give a shorter name"),
        ("circle", "folder", "its links lead in a circle"),
        ("nothing", "folder to write", "it is a link to nothing"),
        ("folder", "folder", ""),
        ("folder/", "folder to write", ""),
        ("new/er/est", "folder to write", ""),
        ("new/er/est", "file to write", ""),
        ("file", "file", ""),
        ("file", "file to write", ""),
        ("link", "folder", ""),
        ("none", "path", ""),
        ("new/er/est", "path to make", ""),
        ("file", "path to make", "must not exist yet"),
        ("folder", "path to make", "must not exist yet"),
        ("nothing", "path to make", "must not exist yet"),
        ("file/x", "path to make", "is no folder"),
        ("x" * 300, "path to make", "give a shorter name"),
    ],
)
def test_what_is_wrong_with_a_path_is_said_with_a_remedy(tmp_path, name, kind, words):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "nothing").symlink_to("gone")
    fault = fault_of(tmp_path / name, kind)
    assert words in fault and bool(fault) == bool(words)
    assert not words or ";" in fault


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do anything")
@pytest.mark.parametrize("kind", KINDS[:-1])  # of a "path" nothing is asked
def test_permissions_count(tmp_path, kind):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    assert "permission denied" in fault_of(locked, "folder").lower() and fault_of(locked / "x", kind)


@given(NAMES)
def test_any_name_can_be_used_and_told(tmp_path_factory, name):
    path = tmp_path_factory.mktemp("names") / f"a{name}"
    assert fault_of(path, "file to write") == ""
    path.touch()
    assert fault_of(path, "file") == "" and fault_of(path, "folder")
    is_utf8 = not any("\udc80" <= character <= "\udcff" for character in name)
    folder = path.with_name(f"b{name}")  # with any other name checkpoints could not be written there
    assert (fault_of(folder, "folder to write") == "") == is_utf8
    folder.mkdir()
    assert (fault_of(folder, "folder") == "") == is_utf8 and fault_of(folder, "file")
    shown = printable_path(path)
    assert shown.isprintable() and shown.encode()  # no lone surrogates
