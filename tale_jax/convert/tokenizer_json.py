"""Our SentencePiece tokenizer as a `tokenizer.json`, with the very same ids for every text.

SentencePiece joins, again and again, the two neighbours whose joined piece has the best score, the leftmost first. The
`tokenizers` library does so by a list of pairs: all pairs of pieces that make a piece, in the order of the pieces'
scores, are that list. Bytes spell what the vocabulary lacks in both.

Spaces: SentencePiece writes one as U+2581 and so cannot tell it from a real U+2581. Here the pieces hold plain spaces,
nothing is normalised, and a real U+2581 is spelled in bytes, as our tokenizer does it. (A model from elsewhere that
puts a space before each text gets the usual form: U+2581 for a space, one put before the text and taken off again.)
"""

from collections.abc import Iterator
from typing import Any

import sentencepiece

from tale_jax.data.json_tokenizer import JsonTokenizer
from tale_jax.data.tokenizer import SPACE, SentencePieceTokenizer, Tokenizer
from tale_jax.utils.extras import missing_extra

PROBE = "aﬁ  a"  # what normalisation, or the squeezing of spaces, would change
UNSEEN = ("\u0378", "\U000e01f0")  # no characters, so that no vocabulary has them


def huggingface_tokenizer(tokenizer: Tokenizer) -> tuple[str, dict[str, Any]]:
    """The content of tokenizer.json and of tokenizer_config.json."""
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.text, dict(tokenizer.settings)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{mark}_token": sp.id_to_piece(index) for mark, index in _marks(tokenizer).items()},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "</s>" in a text is text
    }
    return tokenizer_json(tokenizer.model, bos_id=tokenizer.bos_id), settings


def tokenizer_json(model: bytes, bos_id: int, prefix: bool = False, name: str = "tokenizer") -> str:
    """The tokenizer.json of a SentencePiece model.

    Args:
      model: the bytes of its file.
      bos_id: what `tokenizers` puts before a text unless told not to; -1: nothing.
      prefix: keep the space that the model puts before each text. Ours never do.
      name: for messages.

    Raises:
      ValueError: in one line, for a model that is not byte-pair encoding, or changes the text.
    """
    try:
        import tokenizers
        from tokenizers import decoders, models, normalizers, processors
    except ImportError:
        raise ValueError(missing_extra(name, "tokenizers", "convert")) from None
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    _check_kind(sp, name)
    space = SPACE if prefix else " "
    pieces = [_spelled(sp, index, space) for index in range(sp.vocab_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    unknown = pieces[sp.unk_id()] if sp.unk_id() >= 0 else None
    merges = list(_merges(sp, pieces))
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        library.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        steps = [decoders.Replace(SPACE, " "), *steps, decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    special = [i for i in range(len(pieces)) if sp.is_control(i) or sp.is_unknown(i)]
    library.add_special_tokens([tokenizers.AddedToken(pieces[i], normalized=False, special=True) for i in special])
    if bos_id >= 0:
        bos = pieces[bos_id]
        library.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return library.to_str()


def special_token(tokenizer: Tokenizer, index: int) -> str:
    """How a special token is written, "" for one that the tokenizer lacks."""
    if index < 0:
        return ""
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.library.id_to_token(index)
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model).id_to_piece(index)


def _marks(tokenizer: Tokenizer) -> dict[str, int]:
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    return {mark: index for mark, index in ids.items() if index >= 0}


def _check_kind(sp: sentencepiece.SentencePieceProcessor, name: str) -> None:
    """Byte-pair encoding numbers its pieces, 0, -1, -2, …; other kinds of models have probabilities."""
    scores = [sp.get_score(index) for index in range(sp.vocab_size()) if _is_learned(sp, index)]
    if not all(score.is_integer() for score in scores):
        raise ValueError(f"{name} must be byte-pair encoding, and is a unigram model; train one with launch/prepare.py")
    if len(set(scores)) < len(scores):
        raise ValueError(f"{name} must have no pieces that a user defined; train one with launch/prepare.py")
    if not all(any(sp.is_byte(index) for index in sp.encode(text)) for text in UNSEEN):
        raise ValueError(f"{name} must spell unknown characters in bytes; train one with launch/prepare.py")
    spelled = "".join(piece for piece in sp.encode(PROBE, out_type=str) if not piece.startswith("<0x"))
    if "f" in spelled or spelled.count(SPACE) - spelled.startswith(SPACE) != 2:
        raise ValueError(f"{name} must leave the text as it is, and normalises it; train one with launch/prepare.py")


def _is_learned(sp: sentencepiece.SentencePieceProcessor, index: int) -> bool:
    return not (sp.is_control(index) or sp.is_unknown(index) or sp.is_byte(index) or sp.is_unused(index))


def _spelled(sp: sentencepiece.SentencePieceProcessor, index: int, space: str) -> str:
    piece = sp.id_to_piece(index)
    return piece.replace(SPACE, space) if _is_learned(sp, index) else piece


def _merges(sp: sentencepiece.SentencePieceProcessor, pieces: list[str]) -> Iterator[tuple[str, str]]:
    """Every pair of learned pieces that makes one, the best piece first."""
    learned = {pieces[index]: index for index in range(len(pieces)) if _is_learned(sp, index)}
    for piece, _ in sorted(learned.items(), key=lambda item: (-sp.get_score(item[1]), item[1])):
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [pair for pair in cuts if pair[0] in learned and pair[1] in learned]
        yield from sorted(pairs, key=lambda pair: (learned[pair[0]], learned[pair[1]]))
