"""The tokenizer gives any text back, has BOS and EOS, and equals SentencePiece; what cannot be used is refused."""

import functools
import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tale_jax.config import TokenizerConfig
from tale_jax.data.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    check_tokenizer,
    fillable_vocab_size,
    sample_evenly,
    train_tokenizer,
)

TEXT = [
    "Once upon a time there was a fox. The fox had a red tail,\nand a red hat!\n\nIt went to the town. ",
    "“Where is the town?” asked the fox – nobody knew.\tThe crow, who was old, said: go on and on.",
    "x = 3.14; y = 2025\n    if x > y:\n        return None\r\n",
]


@functools.cache
def trained(vocab_size: int = 360) -> SentencePieceTokenizer:
    return train_tokenizer(TEXT * 5, TokenizerConfig(vocab_size, "", 10_000_000))


def foreign(**options) -> SentencePieceTokenizer:
    """A model such as other programs make."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(TEXT * 5).split("\n")),
        model_writer=model,
        minloglevel=4,
        **({"vocab_size": 360, "model_type": "bpe", "byte_fallback": True, "character_coverage": 1.0} | options),
    )
    return SentencePieceTokenizer(model.getvalue())


@settings(deadline=None)
@given(st.text())
@example("")
@example(" ")
@example("\n \n\n  a\n b  ")
@example("\u2581 a\u2581\u2581b \u2581")
@example("<s></s><unk><pad><0x41>\0\t\x1b\ufeff\u200b\u0301\U0001f9d9\u200d")
@example("ﬁ ① ½ Å \u00a0\u2028\r\n")
def test_any_text_comes_back(text):
    ids = trained().encode(text)
    assert trained().decode(ids) == text
    assert not set(ids.tolist()) & {trained().bos_id, trained().eos_id, trained().pad_id, trained().unk_id}


@settings(deadline=None)
@given(st.text(st.sampled_from("ab fox\n.\té€")))
def test_equals_sentencepiece(text):
    library = sentencepiece.SentencePieceProcessor(model_proto=trained().model)
    assert trained().encode(text).tolist() == library.encode(text)


@settings(deadline=None)
@given(st.text(), st.text())
def test_a_newline_is_one_token_and_separates_lines(before, after):
    newline = trained().encode("\n").tolist()
    assert len(newline) == 1
    whole = trained().encode(f"{before}\n{after}").tolist()
    assert whole == trained().encode(before).tolist() + newline + trained().encode(after).tolist()


def test_words_become_tokens_and_training_is_deterministic():
    tokenizer = trained()
    assert tokenizer.vocab_size == 360
    assert len(tokenizer.encode(" the fox")) < 5
    assert tokenizer.fingerprint == train_tokenizer(TEXT * 5, TokenizerConfig(360, "", 10_000_000)).fingerprint
    assert tokenizer.encode("a").dtype == np.dtype("<u2")
    special_tokens = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode([*special_tokens, *tokenizer.encode("fox"), *special_tokens]) == "fox"


def test_half_a_character_decodes_to_a_replacement():
    ids = trained().encode("€")
    assert trained().decode(ids[:2]) == "\ufffd"
    assert b"".join(trained().token_bytes[i] for i in ids) == "€".encode()


@settings(deadline=None)
@given(st.text())
def test_a_foreign_model_with_a_space_before_the_text_is_lossless_too(text):
    tokenizer = foreign_with_prefix()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@functools.cache
def foreign_with_prefix() -> SentencePieceTokenizer:
    return foreign(
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True
    )


@pytest.mark.parametrize(
    ("options", "vocab_size", "parts"),
    [
        ({}, 360, ["must give every text back", "identity"]),
        ({"byte_fallback": False, "vocab_size": 80}, 80, ["must give every text back", "byte_fallback"]),
        ({"bos_id": -1}, 360, ["bos_id"]),
        ({"eos_id": -1}, 360, ["eos_id"]),
        ({}, 4096, ["tokenizer.vocab_size=4096", "try --config.tokenizer.vocab_size=360"]),
    ],
)
def test_foreign_models_that_cannot_be_used(options, vocab_size, parts):
    with pytest.raises(ValueError, match=r"tokenizer\.path=my\.model") as caught:
        check_tokenizer(foreign(**options), TokenizerConfig(vocab_size, "my.model", 0))
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "part"),
    [
        (
            TEXT,
            100_000,
            r"tokenizer\.vocab_size=100000 must not exceed the \d+ tokens .*; try --config.tokenizer.vocab_size=\d+",
        ),
        (
            ["".join(map(chr, range(0x4E00, 0x4F00)))],
            300,
            r"tokenizer\.vocab_size=300 must hold .*; try --config.tokenizer.vocab_size=\d+",
        ),
        ([], 300, "needs text"),
        ([" \t"], 300, "tokenizer.vocab_size=300 must not exceed"),
        (["\t\0"], 300, "needs text"),
    ],
)
def test_text_that_gives_no_such_vocabulary(texts, vocab_size, part, capfd):
    with pytest.raises(ValueError, match=part) as caught:
        train_tokenizer(texts, TokenizerConfig(vocab_size, "", 10_000_000))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "texts",
    [
        [" ".join(str(i * 7919 % 10) for i in range(5000))],
        ["".join("ACGT"[i * i * 7919 % 11 % 4] for i in range(3000))],
        ["".join(map(chr, range(0x4E00, 0x4F00)))],
        ["".join(map(chr, range(0x4E00, 0x5100)))],
        ["a" * 6000],
        ["ab"],
        ["x " * 500],
        ["\u2581\t "],
        TEXT,
    ],
)
@pytest.mark.parametrize("vocab_size", [261, 300, 512, 4096])
def test_the_vocabulary_that_an_error_advises_works(texts, vocab_size):
    for _ in range(2):  # one remedy is enough
        try:
            tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size, "", 10_000_000))
        except ValueError as error:
            advised = int(str(error).partition("try --config.tokenizer.vocab_size=")[2].partition(",")[0])
            assert advised != vocab_size and advised >= 261
            vocab_size = advised
        else:
            assert tokenizer.vocab_size == vocab_size
            assert fillable_vocab_size(texts, vocab_size) == vocab_size
            return
    pytest.fail("the advice did not help")


def test_a_vocabulary_is_made_to_fit():
    digits = [" ".join(str(i * 7919 % 10) for i in range(5000))]
    assert fillable_vocab_size(digits, 512) == 281
    assert fillable_vocab_size(["".join(map(chr, range(0x4E00, 0x5200)))], 512) >= 256 + 4 + 1024


def test_files_that_are_no_model(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer.load(tmp_path / "no.model")
    (tmp_path / "bad.model").write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"bad\.model must be a SentencePiece model"):
        Tokenizer.load(tmp_path / "bad.model")
    with pytest.raises(ValueError, match="surrogate"):
        trained().encode("\ud83d")


def test_words_longer_and_more_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr("tale_jax.data.tokenizer.MAX_CACHED_WORDS", 5)
    tokenizer = SentencePieceTokenizer(trained().model)
    text = " ".join(f"word{n}" for n in range(20)) + " " + "x" * 10_000
    for _ in range(2):
        assert tokenizer.encode(text).tolist() == trained().encode(text).tolist() == tokenizer.encode_uncached(text)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 1000))
def test_the_sample_is_spread_evenly(sizes, limit):
    texts = [str(i % 10) * size for i, size in enumerate(sizes)]
    chosen = sample_evenly(texts, limit)
    assert sum(map(len, chosen)) <= limit
    step = -(-len(texts) // max(1, len(chosen)))
    assert chosen == texts[:: 1 << (step - 1).bit_length()] if texts else chosen == []


def test_a_single_document_larger_than_the_sample_is_shortened():
    assert sample_evenly(["abcdef", "gh"], 4) == ["abcd"]


def test_text_that_the_trainer_would_misread_is_learned_from():
    """SentencePiece's trainer gives some characters a meaning of its own, and leaves out what is very long."""
    odd = ["a\tb\tc " * 50, "\u2581x\u2585 \0y " * 50, "long" * 30_000]
    tokenizer = train_tokenizer([*TEXT * 5, *odd], TokenizerConfig(360, "", 10_000_000))
    assert any(b"longlong" in token for token in tokenizer.token_bytes)
    for text in (*TEXT, *odd):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_large_vocabularies_have_ids_of_four_bytes(monkeypatch):
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "vocab_size", lambda self: 1 << 16)
    monkeypatch.setattr("tale_jax.data.tokenizer._token_bytes", lambda library, index: b"")
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "id_to_piece", lambda self, index: "x")
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "is_control", lambda self, index: False)
    assert SentencePieceTokenizer(trained().model).dtype == np.dtype("<u2")
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "vocab_size", lambda self: (1 << 16) + 1)
    assert SentencePieceTokenizer(trained().model).dtype == np.dtype("<u4")
