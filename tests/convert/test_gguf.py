"""The .gguf file as its own library reads it: shape, weights, tokenizer. What llama.cpp computes: tests/interop."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from interchange import (
    VARIANTS,
    byte_level_tokenizer,
    hard_texts,
    make_experiment,
    our_tokenizer,
)

from tale_jax.convert.formats import export_model
from tale_jax.convert.gguf import BYTE, CONTROL, UNUSED, gguf_vocabulary, pairs_side_by_side
from tale_jax.convert.tokenizer_json import huggingface_tokenizer
from tale_jax.convert.weights import huggingface_weights
from tale_jax.data.json_tokenizer import JsonTokenizer, pack
from tale_jax.data.tokenizer import SPACE

gguf = pytest.importorskip("gguf", reason="needs the convert extra")
tokenizers = pytest.importorskip("tokenizers", reason="needs the convert extra")
MARKS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


def exported(tmp_path, dtype="float32", tokenizer=None, **changes):
    experiment = make_experiment(tmp_path, tokenizer, **changes)
    export_model(experiment, "gguf", tmp_path / f"{dtype}.gguf", dtype)
    return experiment, gguf.GGUFReader(tmp_path / f"{dtype}.gguf")


def value(reader, name):
    return reader.get_field(name).contents()


@pytest.mark.parametrize("name", VARIANTS)
def test_shape_and_weights(tmp_path, name):
    experiment, reader = exported(tmp_path, **VARIANTS[name])
    c = experiment.config.model
    kind = "qwen3" if c.qk_norm else "llama"
    assert value(reader, "general.architecture") == kind
    wanted = {
        "block_count": c.num_layers,
        "context_length": c.seq_len,
        "embedding_length": c.embed_dim,
        "feed_forward_length": c.mlp_dim,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.head_dim,
        "vocab_size": 360,
    }
    assert {name: value(reader, f"{kind}.{name}") for name in wanted} == wanted
    assert value(reader, f"{kind}.attention.layer_norm_rms_epsilon") == pytest.approx(c.norm_eps)
    tensors = {tensor.name: tensor.data.reshape(tensor.shape[::-1]) for tensor in reader.tensors}
    assert ("output.weight" in tensors) != c.tie_embeddings
    assert ("rope_freqs.weight" in tensors) == bool(c.rope_scaling)
    theirs = dict(huggingface_weights(experiment.params, c))
    np.testing.assert_array_equal(tensors["token_embd.weight"], theirs["model.embed_tokens.weight"])
    np.testing.assert_array_equal(tensors["blk.1.ffn_up.weight"], theirs["model.layers.1.mlp.up_proj.weight"])
    rows, query = tensors["blk.1.attn_q.weight"], theirs["model.layers.1.self_attn.q_proj.weight"]
    if c.qk_norm:
        np.testing.assert_array_equal(rows, query)
        np.testing.assert_array_equal(
            tensors["blk.0.attn_q_norm.weight"], theirs["model.layers.0.self_attn.q_norm.weight"]
        )
    else:
        half = c.head_dim // 2
        np.testing.assert_array_equal(rows[0:4:2], query[:2])
        np.testing.assert_array_equal(rows[1:4:2], query[half : half + 2])


def test_pairs_stand_side_by_side():
    rows = np.arange(12, dtype=np.float32)[:, None]
    assert pairs_side_by_side(rows, 6)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize(
    ("dtype", "kind", "error"), [("float16", "F16", 1e-3), ("bfloat16", "BF16", 1e-2), ("q8_0", "Q8_0", 1e-2)]
)
def test_dtypes(tmp_path, dtype, kind, error):
    experiment, reader = exported(tmp_path, dtype, **VARIANTS["qwen3 untied, grouped"])
    theirs = dict(huggingface_weights(experiment.params, experiment.config.model))
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == ("F32" if "norm" in tensor.name else kind)
    output = next(tensor for tensor in reader.tensors if tensor.name == "output.weight")
    found = gguf.quants.dequantize(output.data, output.tensor_type)
    largest = abs(theirs["lm_head.weight"]).max()
    np.testing.assert_allclose(found, theirs["lm_head.weight"], atol=error * largest)


def test_rows_that_q8_0_cannot_cut_into_blocks_are_float16(tmp_path):
    _, reader = exported(tmp_path, "q8_0", **VARIANTS["llama uneven"])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == "F16" and kinds["blk.0.attn_norm.weight"] == "F32"


def spm_ids(reader, text: str) -> list[int]:
    """What llama.cpp's SentencePiece tokenizer does: join the two whose token has the best score, leftmost first."""
    tokens = value(reader, "tokenizer.ggml.tokens")
    scores = dict(zip(tokens, value(reader, "tokenizer.ggml.scores"), strict=True))
    ids = {token: index for index, token in enumerate(tokens)}
    symbols = list(text.replace(" ", SPACE))
    while True:
        joined = [left + right for left, right in itertools.pairwise(symbols)]
        best = max(
            (index for index, token in enumerate(joined) if token in ids), key=lambda i: scores[joined[i]], default=-1
        )
        if best < 0:
            break
        symbols[best : best + 2] = [joined[best]]
    found = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def test_the_tokenizer_is_read_by_llama_cpp_as_ours(tmp_path):
    _, reader = exported(tmp_path)
    assert value(reader, "tokenizer.ggml.model") == "llama"
    assert value(reader, "tokenizer.ggml.add_space_prefix") is False
    assert value(reader, "tokenizer.ggml.add_bos_token") is True
    assert value(reader, "tokenizer.ggml.add_eos_token") is False
    assert [value(reader, f"tokenizer.ggml.{mark}_token_id") for mark in ("bos", "eos", "padding")] == [1, 2, 3]
    kinds = value(reader, "tokenizer.ggml.token_type")
    assert kinds[:4] == [2, 3, 3, 3] and kinds.count(BYTE) == 256 and kinds[-1] == 1
    for text in hard_texts(1_000):
        if SPACE not in text and len(text) < 60:
            assert spm_ids(reader, text) == our_tokenizer().encode(text).tolist(), repr(text)


def test_the_same_tokenizer_from_its_tokenizer_json():
    ours = gguf_vocabulary(our_tokenizer(), 360)
    back = gguf_vocabulary(JsonTokenizer(pack(*huggingface_tokenizer(our_tokenizer()))), 360)
    assert (back.tokens, back.kinds, back.add_bos, back.add_space_prefix) == (ours.tokens, ours.kinds, True, False)
    order = sorted(range(260, 360), key=lambda index: -ours.scores[index])
    learned = [index for index in order if len(ours.tokens[index].decode()) > 1]
    assert learned == sorted(learned, key=lambda index: -back.scores[index])


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2"])
def test_byte_level_tokenizers(tmp_path, kind):
    library = byte_level_tokenizer(kind)
    tokenizer = JsonTokenizer(pack(library.to_str(), MARKS))
    rows = 448
    _, reader = exported(tmp_path, tokenizer=tokenizer, **{"tokenizer.vocab_size": rows, "model.qk_norm": False})
    assert value(reader, "tokenizer.ggml.model") == "gpt2" and value(reader, "tokenizer.ggml.pre") == kind
    tokens, kinds = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    size = tokenizer.vocab_size
    assert tokens[:size] == [library.id_to_token(index) for index in range(size)] and len(tokens) == rows
    assert kinds[size - 3 : size + 1] == [CONTROL, CONTROL, 4, UNUSED]
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    merges = value(reader, "tokenizer.ggml.merges")
    assert len(merges) == size - 3 - 256 and all(len(merge.split(" ")) == 2 for merge in merges)


def test_what_llama_cpp_cannot_be_told(tmp_path):
    library = byte_level_tokenizer("gpt-2")
    changed = re.sub('"add_prefix_space":false', '"add_prefix_space":true', library.to_str())
    odd = make_experiment(tmp_path, JsonTokenizer(pack(changed, MARKS)))
    with pytest.raises(
        ValueError, match=r'pre-tokenizers \["ByteLevel"\] must be those of gpt-2, smollm, qwen2.*--to=hugg'
    ):
        export_model(odd, "gguf", tmp_path / "x.gguf")
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    unigram.add_special_tokens(["<s>", "</s>"])
    one = make_experiment(tmp_path, JsonTokenizer(pack(unigram.to_str(), {"bos_token": "<s>", "eos_token": "</s>"})))
    with pytest.raises(ValueError, match=r"must be byte-pair encoding for gguf, .* write --to=huggingface"):
        export_model(one, "gguf", tmp_path / "x.gguf")
    experiment = make_experiment(tmp_path)
    scaled = dataclasses.replace(experiment.config.model, rope_scaling=8.0)
    config = dataclasses.replace(experiment.config, model=scaled)
    with pytest.raises(ValueError, match=r"model\.rope_scaling must be 0 with model\.qk_norm for gguf"):
        export_model(dataclasses.replace(experiment, config=config), "gguf", tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
    for number, refused in enumerate((odd, one, dataclasses.replace(experiment, config=config))):
        export_model(refused, "huggingface", tmp_path / f"out{number}")
