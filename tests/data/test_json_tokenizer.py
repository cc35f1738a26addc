"""A tokenizer.json behind the one interface: ids of the library, bytes of each token, marks, files, mistakes."""

import json

import numpy as np
import pytest
from interchange import SPECIAL_TEXTS, byte_level_tokenizer, hard_texts, our_tokenizer

from tale_jax.data.json_tokenizer import JsonTokenizer, byte_characters, pack
from tale_jax.data.tokenizer import Tokenizer, read_tokenizer, tokenizer_file

pytest.importorskip("tokenizers", reason="needs the convert extra")
SETTINGS = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}, "pad_token": None}


def byte_level(kind: str = "gpt-2") -> JsonTokenizer:
    return JsonTokenizer(pack(byte_level_tokenizer(kind).to_str(), SETTINGS))


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2"])
def test_ids_are_those_of_the_library_and_texts_come_back(kind):
    library, ours = byte_level_tokenizer(kind), byte_level(kind)
    library.encode_special_tokens = True
    for text in hard_texts(2_000):
        ids = ours.encode(text)
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == library.decode(ids.tolist())
        if kind != "qwen2":  # which normalises
            assert ours.decode(ids) == text
        assert b"".join(ours.token_bytes[i] for i in ids).decode() == ours.decode(ids)


def test_marks_and_special_tokens_in_a_text():
    ours = byte_level()
    assert ours.bos_id == ours.eos_id == ours.vocab_size - 3 and (ours.pad_id, ours.unk_id) == (-1, -1)
    assert ours.token_bytes[ours.bos_id] == b"" and ours.token_bytes[ours.vocab_size - 1] == b"<think>"
    assert ours.dtype == np.dtype("<u2")
    for text in SPECIAL_TEXTS:
        ids = ours.encode(text).tolist()
        assert not set(ids) & ours.special_ids and ours.decode(ids) == text
    assert ours.encode("<think>").tolist() == [ours.vocab_size - 1]


def test_half_a_character_is_its_bytes():
    ours = byte_level()
    ids = ours.encode("€")
    assert len(ids) > 1 and b"".join(ours.token_bytes[i] for i in ids) == "€".encode()
    assert ours.decode(ids[:1]) == "\ufffd"
    assert sorted(byte_characters().values()) == list(range(256))


def test_files_and_bytes_make_it_again(tmp_path):
    ours = byte_level()
    (tmp_path / "tokenizer").mkdir()
    our_tokenizer().save(tmp_path / "tokenizer")
    assert Tokenizer.load(tokenizer_file(tmp_path)).fingerprint == our_tokenizer().fingerprint
    ours.save(tmp_path / "tokenizer")
    loaded = Tokenizer.load(tokenizer_file(tmp_path))
    assert isinstance(loaded, JsonTokenizer)
    for one in (loaded, read_tokenizer(ours.model)):
        assert one.fingerprint == ours.fingerprint and one.token_bytes == ours.token_bytes
    assert read_tokenizer(our_tokenizer().model).token_bytes == our_tokenizer().token_bytes


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\xff", "must be JSON in UTF-8"),
        (b"{", "must be JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "of type None must be one of BPE, Unigram"),
        (b'{"model": {"type": "WordPiece"}}', "of type WordPiece must be one of BPE, Unigram"),
        (b'{"model": {"type": "BPE"}}', "is not a tokenizer.json that can be read"),
    ],
)
def test_files_that_are_none(tmp_path, content, part):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=part) as caught:
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text(byte_level_tokenizer().to_str())  # copied again
    assert Tokenizer.load(tmp_path / "tokenizer.json").vocab_size == byte_level().vocab_size


def test_settings_that_are_no_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level_tokenizer().to_str())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must be JSON"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    assert Tokenizer.load(tmp_path / "tokenizer.json").bos_id > 0
