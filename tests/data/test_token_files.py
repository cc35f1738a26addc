"""Token files: the documents come back in order, and a missing or damaged file is told in one line."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import build_config
from hypothesis import given
from hypothesis import strategies as st

from tale_jax.data.prepare import prepare
from tale_jax.data.token_files import (
    document_starts,
    iter_documents,
    load_manifest,
    load_tokens,
    save_manifest,
    seal_tokens,
    tokens_digest,
)
from tale_jax.utils.manifests import digest_of

BOS = 1


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 30))
def test_document_starts_do_not_depend_on_the_blocks(lengths, block):
    tokens = np.concatenate([np.array([BOS] + [7] * (length - 1), np.uint16) for length in [*lengths, 1]])
    starts = document_starts(tokens, BOS, block)
    assert starts.tolist() == np.cumsum([0, *lengths]).tolist()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "book.txt").write_text("".join(f"Chapter {n}. A fox – went over hill {n}.\n\n" for n in range(900)))
    changes = {"corpus.name": "files", "corpus.path": str(folder / "book.txt"), "tokenizer.vocab_size": 320}
    return prepare(build_config(**changes), folder / "work")


@pytest.fixture
def workdir(prepared, tmp_path):
    """A copy of the prepared workdir, to be damaged."""
    for file in prepared.workdir.rglob("*.*"):
        copy = tmp_path / file.relative_to(prepared.workdir)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return tmp_path


def test_documents_come_back_in_order(prepared):
    tokens, manifest = load_tokens(prepared.workdir, "train")
    texts = list(iter_documents(tokens, prepared.tokenizer))
    assert len(texts) == manifest.documents > 1
    numbers = [int(text.split()[1].rstrip(".")) for text in texts]
    assert numbers == sorted(numbers)
    assert all(text.startswith("Chapter") for text in texts)


def test_a_manifest_is_read_as_it_was_written(prepared):
    assert load_manifest(prepared.workdir, "valid") == prepared.manifests["valid"]


def test_a_split_that_was_not_prepared(tmp_path):
    with pytest.raises(
        ValueError, match=r"^workdir=.* has no prepared train split; run launch/prepare.py on it first$"
    ):
        load_tokens(tmp_path, "train")


def test_one_bit_of_a_token_file_is_found(workdir):
    file = workdir / "windows" / "train.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.bin is damaged: its digest is not that of its manifest"):
        load_tokens(workdir, "train")


def test_a_digest_that_another_process_found_is_taken(workdir, prepared):
    """The file is not read through again; it still has to be the one of its manifest."""
    file = workdir / "windows" / "train.bin"
    found = prepared.manifests["train"].sha256
    assert tokens_digest(file) == tokens_digest(file, "another") == found  # what this process found itself stays
    file.write_bytes(bytes(file.stat().st_size))  # whoever reads it finds another digest
    assert tokens_digest(file, found) == found
    assert len(load_tokens(workdir, "train")[0]) == prepared.manifests["train"].tokens
    file.write_bytes(bytes(file.stat().st_size))  # again, and later: known by its time
    assert tokens_digest(file, "another") == "another"
    with pytest.raises(ValueError, match=r"train\.bin is damaged: its digest is not that of its manifest"):
        load_tokens(workdir, "train")


@pytest.mark.parametrize("dtype", ["|O", "<f4", "", "<u8", "nonsense"])
def test_a_manifest_of_another_dtype_is_refused_before_a_byte_is_read(workdir, prepared, dtype):
    """An object dtype would make pointers of the bytes."""
    save_manifest(workdir, dataclasses.replace(prepared.manifests["train"], dtype=dtype))
    with pytest.raises(ValueError, match=r"train\.json is damaged"):
        load_tokens(workdir, "train")


def test_windows_of_version_1_are_read_and_given_a_digest(workdir, prepared):
    values = dataclasses.asdict(prepared.manifests["train"]) | {"format_version": 1}
    del values["sha256"]
    (workdir / "windows" / "train.json").write_text(json.dumps(values))
    _, manifest = load_tokens(workdir, "train")
    assert manifest.sha256 == ""
    assert seal_tokens(workdir, manifest) == load_manifest(workdir, "train") == prepared.manifests["train"]


@pytest.mark.parametrize("cut", [1, 2, None])
def test_a_token_file_of_another_size(workdir, cut):
    file = workdir / "windows" / "train.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut]) if cut else file.unlink()
    size = len(whole) - cut if cut else 0
    with pytest.raises(
        ValueError, match=rf"train\.bin must have {len(whole)} bytes, but has {size}; remove .*train.json"
    ):
        load_tokens(workdir, "train")


def signed(values):
    return json.dumps(values | {"digest": digest_of(values)})


def test_a_damaged_manifest(workdir, prepared):
    values = dataclasses.asdict(prepared.manifests["train"])
    for text, part in (
        (json.dumps(values | {"format_version": 0}), "train.json must have format_version=2; remove .* prepare again"),
        (json.dumps(values), r"train.json is damaged \(its digest does not fit\); remove .* prepare again"),
        ("{", r"train.json is damaged \(.*\); remove .* prepare again"),
        ("{}", "train.json is damaged"),
        ("[]", "train.json is damaged"),
        (json.dumps(values | {"new": 1}), "train.json is damaged"),
        (signed(values | {"documents": "9"}), r"damaged \(documents has a value that cannot be\)"),
        (signed(values | {"tokens": -1}), r"damaged \(it counts what cannot be\)"),
        (signed(values | {"split": "../../etc"}), r"damaged \(it is not of this split"),
        (signed(values | {"replaced": [3]}), r"damaged \(replaced has a value that cannot be\)"),
        (signed(values | {"entropy": {"nats": "1"}}), r"damaged \(entropy or seen_share has a value that cannot be\)"),
    ):
        (workdir / "windows" / "train.json").write_text(text)
        with pytest.raises(ValueError, match=part) as caught:
            load_tokens(workdir, "train")
        assert "\n" not in str(caught.value)
