"""Out to one `.gguf` file, which llama.cpp and what is built on it (Ollama, LM Studio, …) run.

    export_gguf(experiment, Path("tales.gguf"), "q8_0")

The architecture is `llama`, whose query and key rows llama.cpp wants in another order (the pairs that rotate stand side
by side there), or `qwen3` where queries and keys are normalised, which are left as they are. Norms stay in float32. Our
tokenizer becomes a `llama` (SentencePiece) one with its real scores: that spells unknown characters in bytes because
the tokens for bytes are of their own type, and puts no space before a text because it is told not to. llama.cpp cannot
tell a space from a real U+2581, which ours can: the one text that differs. Byte-level byte-pair encoding becomes a
`gpt2` tokenizer with its merges and the name by which llama.cpp knows how it cuts words.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from jaxtyping import Float

from tale_jax.config import ModelConfig
from tale_jax.convert.dtypes import cast
from tale_jax.convert.huggingface import chat_template
from tale_jax.convert.weights import huggingface_weights
from tale_jax.data.json_tokenizer import JsonTokenizer
from tale_jax.data.tokenizer import SPACE, Tokenizer
from tale_jax.model.attention import rotary_frequencies
from tale_jax.runs.experiment import Experiment
from tale_jax.utils.extras import missing_extra

FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
Q8_BLOCK = 32  # weights of a row that share a scale
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of tokens
# How llama.cpp calls the ways to cut a text into words: name → the pre-tokenizers of tokenizer.json, in order.
_GPT2 = ("ByteLevel", True)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "gpt-2": (_GPT2,),
    "smollm": (("Digits", True), _GPT2),
    "qwen2": (("Split", _WORDS % r"\p{N}"), ("ByteLevel", False)),
    "llama-bpe": (("Split", _WORDS % r"\p{N}{1,3}"), ("ByteLevel", False)),
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llama.cpp has it: `model` is llama (with scores) or gpt2 (with merges and `pre`)."""

    model: str
    tokens: list[bytes]
    kinds: list[int]
    add_bos: bool
    scores: list[float] = dataclasses.field(default_factory=list)
    add_space_prefix: bool = False
    merges: list[str] = dataclasses.field(default_factory=list)
    pre: str = "default"


def export_gguf(experiment: Experiment, out: Path, dtype: str = "float32") -> None:
    """Writes a .gguf file. Raises ValueError, in one line, for what llama.cpp cannot be told."""
    try:
        import gguf
    except ImportError:
        raise ValueError(missing_extra("--to=gguf", "gguf", "convert")) from None
    c, tokenizer = experiment.config.model, experiment.tokenizer
    if c.qk_norm and c.rope_scaling:
        raise ValueError("model.rope_scaling must be 0 with model.qk_norm for gguf; write --to=huggingface")
    vocabulary = gguf_vocabulary(tokenizer, experiment.config.tokenizer.vocab_size)
    writer = gguf.GGUFWriter(out, "qwen3" if c.qk_norm else "llama")
    writer.add_name(experiment.workdir.absolute().name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, c, experiment.config.tokenizer.vocab_size)
    _add_vocabulary(writer, vocabulary, tokenizer)
    if template := chat_template(experiment):
        writer.add_chat_template(template)
    for name, array in gguf_weights(experiment.params, c):
        written, kind = _encoded(name, array, dtype)
        writer.add_tensor(name, written, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_weights(params: Any, config: ModelConfig) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """Names and float32 weights as llama.cpp has them."""
    import gguf

    c = config
    architecture = gguf.MODEL_ARCH.QWEN3 if c.qk_norm else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(architecture, c.num_layers)
    for theirs, array in huggingface_weights(params, c):
        if not c.qk_norm and theirs.endswith(("q_proj.weight", "k_proj.weight")):
            array = pairs_side_by_side(array, c.head_dim)
        name = names.get_name(theirs, try_suffixes=(".weight",))
        assert name, theirs
        yield name, array
    if c.rope_scaling:
        plain = rotary_frequencies(c.head_dim, c.rope_base)
        slowed = rotary_frequencies(c.head_dim, c.rope_base, c.rope_scaling, c.rope_original_len)
        yield "rope_freqs.weight", np.asarray(plain / slowed, np.float32)


def pairs_side_by_side(rows: Float[np.ndarray, "NH D"], head_dim: int) -> Float[np.ndarray, "NH D"]:
    """The rows of each head in the order 0, H/2, 1, H/2 + 1, …: rotary pairs as llama.cpp's `llama` turns them."""
    heads = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def _add_shape(writer: Any, c: ModelConfig, vocab_size: int) -> None:
    writer.add_vocab_size(vocab_size)
    writer.add_context_length(c.seq_len)
    writer.add_embedding_length(c.embed_dim)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.mlp_dim)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_rope_dimension_count(c.head_dim)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
        writer.add_remove_extra_whitespaces(False)
    for mark in ("bos", "eos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{mark}_id")) >= 0:
            getattr(writer, f"add_{mark}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)


def _encoded(name: str, array: Float[np.ndarray, "..."], dtype: str) -> tuple[np.ndarray, Any]:
    """A tensor as it is written, and its type: vectors, and rows that q8_0 cannot cut into blocks, less densely."""
    from gguf import GGMLQuantizationType, quants

    if array.ndim == 1 or dtype == "float32":
        return array, GGMLQuantizationType.F32
    if dtype == "float16" or (dtype == "q8_0" and array.shape[-1] % Q8_BLOCK):
        return cast(name, array, "float16"), GGMLQuantizationType.F16
    kind = GGMLQuantizationType.BF16 if dtype == "bfloat16" else GGMLQuantizationType.Q8_0
    return quants.quantize(array, kind), kind


# The tokenizer.


def gguf_vocabulary(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """The tokenizer for llama.cpp, with tokens that are never used up to the `rows` of the embedding."""
    if not isinstance(tokenizer, JsonTokenizer):
        vocabulary = _of_sentencepiece(tokenizer)
    elif tokenizer.byte_level:
        vocabulary = _of_byte_level(tokenizer)
    else:
        vocabulary = _of_sentencepiece_json(tokenizer)
    unused = range(len(vocabulary.tokens), rows)
    return dataclasses.replace(
        vocabulary,
        tokens=vocabulary.tokens + [f"[PAD{index}]".encode() for index in unused],
        kinds=vocabulary.kinds + [UNUSED] * len(unused),
        scores=vocabulary.scores + [-1e4] * len(unused) if vocabulary.scores else [],
    )


def _of_sentencepiece(tokenizer: Tokenizer) -> Vocabulary:
    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)

    def kind(index: int) -> int:
        if sp.is_unknown(index):
            return UNKNOWN
        if sp.is_control(index):
            return CONTROL
        return BYTE if sp.is_byte(index) else UNUSED if sp.is_unused(index) else NORMAL

    ids = range(sp.vocab_size())
    return Vocabulary(
        "llama",
        [sp.id_to_piece(index).encode() for index in ids],
        [kind(index) for index in ids],
        add_bos=True,
        scores=[sp.get_score(index) for index in ids],
    )


def _of_sentencepiece_json(tokenizer: JsonTokenizer) -> Vocabulary:
    """Scores are the places of the merges: llama.cpp joins the pair whose piece has the best one."""
    pieces = _pieces(tokenizer)
    learned = {piece: index for index, piece in enumerate(pieces)}
    scores = [-1e6] * len(pieces)
    for place, (left, right) in enumerate(_merges(tokenizer)):
        index = learned[left + right]
        scores[index] = max(scores[index], -float(place))

    def kind(index: int) -> int:
        piece = pieces[index]
        if index == tokenizer.unk_id:
            return UNKNOWN
        if index in tokenizer.special_ids:
            return CONTROL
        if index in tokenizer.added:
            return USER_DEFINED
        return BYTE if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else NORMAL

    spaced = tokenizer.library.encode("a", add_special_tokens=False).tokens[0][:1] in (SPACE, " ")
    return Vocabulary(
        "llama",
        [piece.replace(" ", SPACE).encode() for piece in pieces],
        [kind(index) for index in range(len(pieces))],
        add_bos=tokenizer.puts_bos,
        scores=[0.0 if index in tokenizer.added else score for index, score in enumerate(scores)],
        add_space_prefix=spaced,
    )


def _of_byte_level(tokenizer: JsonTokenizer) -> Vocabulary:
    pieces = _pieces(tokenizer)
    cut = tuple(_pre_tokenizers(tokenizer.specification.get("pre_tokenizer")))
    pre = next((name for name, parts in PRE_TOKENIZERS.items() if parts == cut), "")
    if not pre:
        said = json.dumps([kind for kind, _ in cut])
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(
            f"the tokenizer's pre-tokenizers {said} must be those of {known} for gguf; write --to=huggingface"
        )
    kinds = [NORMAL] * len(pieces)
    for index in tokenizer.added:
        kinds[index] = CONTROL if index in tokenizer.special_ids else USER_DEFINED
    merges = [f"{left} {right}" for left, right in _merges(tokenizer)]
    tokens = [piece.encode() for piece in pieces]
    return Vocabulary("gpt2", tokens, kinds, add_bos=tokenizer.puts_bos, merges=merges, pre=pre)


def _pieces(tokenizer: JsonTokenizer) -> list[str]:
    """The token of each id; ids that have none get a name."""
    if tokenizer.specification["model"]["type"] != "BPE":
        raise ValueError(
            "the tokenizer must be byte-pair encoding for gguf, and is a unigram model; write --to=huggingface"
        )
    found = (tokenizer.library.id_to_token(index) for index in range(tokenizer.vocab_size))
    return [f"[PAD{index}]" if piece is None else piece for index, piece in enumerate(found)]


def _merges(tokenizer: JsonTokenizer) -> Iterator[tuple[str, str]]:
    """Pairs that become one token, in order; an older tokenizer.json has them as text, with a space between."""
    for pair in tokenizer.specification["model"]["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        yield left, right


def _pre_tokenizers(component: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    """What cuts the text, as in `PRE_TOKENIZERS`; something that is not there for what none of them does."""
    match component or {}:
        case {"type": "Sequence", "pretokenizers": parts}:
            for part in parts:
                yield from _pre_tokenizers(part)
        case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
            yield "ByteLevel", rest.get("use_regex", True)
        case {"type": "Digits", "individual_digits": each}:
            yield "Digits", each
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            yield "Split", pattern
        case {"type": kind}:
            yield kind, None
