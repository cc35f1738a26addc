"""Our tokenizer as a tokenizer.json: the same ids for every text; models that cannot be written are refused."""

import io
import json
import sys

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from interchange import TEXT, hard_texts, our_tokenizer

from tale_jax.convert.tokenizer_json import huggingface_tokenizer, tokenizer_json
from tale_jax.data.json_tokenizer import JsonTokenizer, pack

tokenizers = pytest.importorskip("tokenizers", reason="needs the convert extra")


def library():
    found = tokenizers.Tokenizer.from_str(huggingface_tokenizer(our_tokenizer())[0])
    found.encode_special_tokens = True
    return found


def model_file(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(TEXT * 5).split("\n")),
        model_writer=model,
        minloglevel=4,
        **(
            {
                "vocab_size": 380,
                "model_type": "bpe",
                "byte_fallback": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
            }
            | options
        ),
    )
    return model.getvalue()


def test_ids_agree_on_ten_thousand_texts():
    ours, theirs = our_tokenizer(), library()
    texts = hard_texts()
    assert len(texts) == 10_000 and any("\u2581" in text for text in texts) and any("</s>" in text for text in texts)
    for text, found in zip(texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True):
        assert found.ids == ours.encode(text).tolist(), repr(text)
        assert theirs.decode(found.ids) == text


@given(st.text())
def test_ids_agree(text):
    ids = library().encode(text).ids
    assert ids == [our_tokenizer().bos_id, *our_tokenizer().encode(text)]


def test_half_a_surrogate_pair_is_refused_by_both():
    with pytest.raises(ValueError, match="surrogate"):
        our_tokenizer().encode("\ud83d")
    with pytest.raises((TypeError, UnicodeEncodeError)):
        library().encode("\ud83d")


def test_a_tokenizer_of_ours_comes_back_as_one_of_theirs():
    specification, settings = huggingface_tokenizer(our_tokenizer())
    back = JsonTokenizer(pack(specification, settings))
    ours = our_tokenizer()
    for mark in ("vocab_size", "bos_id", "eos_id", "pad_id", "unk_id", "dtype"):
        assert getattr(back, mark) == getattr(ours, mark)
    assert back.token_bytes[4:] == ours.token_bytes[4:]
    assert huggingface_tokenizer(back) == (specification, settings)


@pytest.mark.parametrize("text", [" a fox", "a  fox ", "The fox", "\n\n", "½ \U0001f9d9", ""])
def test_a_model_that_puts_a_space_first_keeps_it(text):
    model = model_file()
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    found = JsonTokenizer(pack(tokenizer_json(model, bos_id=1, prefix=True), {"bos_token": "<s>", "eos_token": "</s>"}))
    assert found.encode(text).tolist() == sp.encode(text)
    assert found.decode(found.encode(text)) == text


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"model_type": "unigram", "vocab_size": 330}, "must be byte-pair encoding"),
        ({"normalization_rule_name": "nmt_nfkc"}, "must leave the text as it is"),
        ({"remove_extra_whitespaces": True}, "must leave the text as it is"),
        ({"byte_fallback": False, "vocab_size": 80}, "must spell unknown characters in bytes"),
        ({"user_defined_symbols": ["fox", "hat"]}, "must have no pieces that a user defined"),
    ],
)
def test_models_that_no_tokenizer_json_can_hold(options, part):
    with pytest.raises(ValueError, match=part) as caught:
        tokenizer_json(model_file(**options), bos_id=1, name="my.model")
    assert str(caught.value).startswith("my.model ") and "\n" not in str(caught.value)
    assert tokenizer_json(our_tokenizer().model, bos_id=1, name="my.model")  # as launch/prepare.py trains one


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs tokenizers, which is not installed; .*convert"):
        huggingface_tokenizer(our_tokenizer())
    with pytest.raises(ValueError, match=r"needs tokenizers, which is not installed; .*convert"):
        JsonTokenizer(pack(json.dumps({"model": {"type": "BPE"}}), {}))
