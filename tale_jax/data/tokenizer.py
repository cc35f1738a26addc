"""Text <-> tokens: SentencePiece byte-pair encoding that gives every Unicode text back exactly.

Kudo & Richardson, "SentencePiece: A simple and language independent subword tokenizer and detokenizer for Neural Text
Processing", EMNLP 2018. Four choices make it lossless: identity normalisation, no squeezing of spaces, no space put
before the text, and a piece for each byte, which spells what the vocabulary lacks. A newline is always the one token
<0x0A>: no learned piece holds one, so that lines and paragraphs can be told from the tokens.

Two things are ours. SentencePiece writes a space as U+2581, and so would read a real U+2581 back as a space: here it is
spelled in bytes, which any SentencePiece decoder understands. And since no piece reaches over a space, each word's
tokens are looked up in a table of the words met so far: several times faster than the library, and equal to it.

    tokenizer = Tokenizer.load(tokenizer_file(workdir))
    tokenizer.decode(tokenizer.encode("Once upon a time"))
"""

import collections
import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import UInt

from tale_jax.config import TokenizerConfig

SPACE = "\u2581"  # how SentencePiece writes a space
MAX_TABLE = 400_000  # words kept in the table, about 100 MB
MAX_WORD = 64  # characters of the longest
_RESERVED = ("\t", "\0", SPACE, "\u2585")  # SentencePiece's trainer gives these a meaning of its own
_PROBE = f" Tab\tand  two spaces,\n\nline ends\r\n, {SPACE}, <s>, ① ﬁ e\u0301 ½, \U0001f9d9 \0\u200b. "


class Tokenizer:
    """A SentencePiece model. Make one with `load`, `train_tokenizer` or from the bytes of a model file.

    Attributes:
      model: the bytes of the model file.
      fingerprint: their sha256, in hex.
      vocab_size, bos_id, eos_id, pad_id, unk_id: of the model; an id that it lacks is -1.
      dtype: little-endian uint16, or uint32 above 65,536 pieces.
      token_bytes: for each id, the UTF-8 it stands for (half a character, perhaps); b"" for BOS, EOS and PAD.
    """

    def __init__(self, model: bytes, name: str = "tokenizer"):
        try:
            self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError(f"{name} must be a SentencePiece model; give a .model file") from None
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = sp.vocab_size()
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = sp.bos_id(), sp.eos_id(), sp.pad_id(), sp.unk_id()
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self.token_bytes = [_token_bytes(sp, i) for i in range(self.vocab_size)]
        self._space_bytes = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        # A model made elsewhere may put a space before each text: a newline takes it, and is taken off again.
        self._guard = sp.encode("\n") if sp.encode("a", out_type=str)[0].startswith(SPACE) else []
        learned = [sp.id_to_piece(i) for i in range(self.vocab_size)]
        self._table: _Table | None = _Table(self)
        if any(SPACE in piece[1:] or ("\n" in piece and piece != "\n") for piece in learned):
            self._table = None  # pieces of another's model may reach from word to word

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Reads a model file. Raises ValueError, in one line, when it is missing or is not one."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} does not exist; give a SentencePiece .model file (launch/prepare.py makes one)")
        return cls(path.read_bytes(), str(path))

    def encode(self, text: str) -> UInt[np.ndarray, " T"]:
        """Text -> its tokens, of `dtype`, without BOS and EOS. Raises ValueError for half a surrogate pair."""
        if self._table is None:
            return np.array(self.spell(text), self.dtype)
        if len(self._table) > MAX_TABLE:
            self._table.clear()
        tokens = b"".join(map(self._table.__getitem__, _words(text)))
        return np.frombuffer(tokens, self.dtype, offset=len(self._table["\n"]))

    def learn(self, words: Iterable[str]) -> None:
        """Puts words, as `_words` cuts them, into the table. Together they take half the time."""
        if self._table is None or self._guard:
            return
        plain = [word for word in words if len(word) < MAX_WORD and SPACE not in word]
        for word, ids in zip(plain, self._sp.encode([_spelled(word) for word in plain]), strict=True):
            self._table[word] = np.array(ids, self.dtype).tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        """Tokens -> text; BOS, EOS and PAD give nothing, and bytes that do not make a character give U+FFFD."""
        return b"".join([self.token_bytes[i] for i in ids]).decode(errors="replace")

    def spell(self, text: str) -> list[int]:
        """Text -> ids, without the table of words."""
        if text.isascii():
            return self._pieces(text)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"text {text[:40]!r} must not hold half a surrogate pair; remove it") from None
        first, *rest = text.split(SPACE)
        ids = self._pieces(first)
        for part in rest:
            ids += self._space_bytes + self._pieces(part)
        return ids

    def _pieces(self, text: str) -> list[int]:
        return self._sp.encode("\n" + text)[len(self._guard) :] if self._guard else self._sp.encode(text)


def tokenizer_file(workdir: Path) -> Path:
    """Where an experiment keeps its tokenizer."""
    return workdir / "tokenizer" / "tokenizer.model"


def _words(text: str) -> list[str]:
    """Cuts before each space, which is dropped, and each newline, which is kept; the text is taken for a line."""
    return ("\n" + text.replace("\n", " \n")).split(" ")


def _spelled(word: str) -> str:
    """The text that a word of `_words` stands for."""
    return word if word[:1] == "\n" else " " + word


class _Table(dict[str, bytes]):
    """Word, as `_words` cuts them -> its tokens."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> bytes:
        found = np.array(self._tokenizer.spell(_spelled(word)), self._tokenizer.dtype).tobytes()
        if len(word) < MAX_WORD:
            self[word] = found
        return found


def train_tokenizer(documents: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Learns a vocabulary of `config.vocab_size` pieces from documents, of which at most `sample_bytes` are used.

    The result depends on the documents and the settings only. Memory: about the sample, and a table of its words.

    Raises:
      ValueError: one line, when the text is too small, or has too many characters, for such a vocabulary.
    """
    model, counts = io.BytesIO(), collections.Counter[str]()
    for text in spread(documents, config.sample_bytes):
        counts.update(_words(text))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_trainable(counts),
            input_format="tsv",
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=1 << 16,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=4,  # silent: what goes wrong is raised
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), config)) from None
    tokenizer = Tokenizer(model.getvalue())
    tokenizer.learn(itertools.islice(counts, MAX_TABLE))
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """What a model given as `tokenizer.path` must have. Raises ValueError, in one line, when it does not."""
    name = f"tokenizer.path={config.path}"
    for mark in ("bos_id", "eos_id"):
        if getattr(tokenizer, mark) < 0:
            raise ValueError(f'{name} must have a {mark}, to mark documents; give another, or tokenizer.path=""')
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={config.vocab_size} must be that of {name}; "
            f"try tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    if (back := tokenizer.decode(tokenizer.encode(_PROBE))) != _PROBE:
        raise ValueError(
            f"{name} must give every text back, but makes {back!r} of {_PROBE!r}; give a model with byte_fallback, "
            'identity normalisation and remove_extra_whitespaces=False, or tokenizer.path="" to train one'
        )


def spread(documents: Iterable[str], max_bytes: int) -> list[str]:
    """Every k-th document, with the smallest power of two k for which they are at most `max_bytes` together.

    One pass and no random numbers: as the sample outgrows its limit, every second document is dropped.
    """
    kept: list[tuple[str, int]] = []
    total, step = 0, 1
    for index, text in enumerate(documents):
        if index % step:
            continue
        kept.append((text, len(text.encode())))
        total += kept[-1][1]
        while total > max_bytes and len(kept) > 1:
            kept, step = kept[::2], 2 * step
            total = sum(size for _, size in kept)
    return [text[:max_bytes] for text, _ in kept]


def _trainable(counts: Mapping[str, int]) -> Iterator[str]:
    """Words and how often they occur, as the trainer reads them: the same as the text itself, only faster."""
    for word, count in counts.items():
        text = _spelled(word).lstrip("\n")
        for mark in _RESERVED:
            text = text.replace(mark, "")
        if text:
            yield f"{text[:4000]}\t{count}"


def _token_bytes(sp: sentencepiece.SentencePieceProcessor, index: int) -> bytes:
    piece = sp.id_to_piece(index)
    if sp.is_control(index):
        return b""
    if sp.is_byte(index):
        return bytes([int(piece[3:5], 16)])
    return "\ufffd".encode() if sp.is_unknown(index) else piece.replace(SPACE, " ").encode()


def _explain(message: str, config: TokenizerConfig) -> str:
    field = f"tokenizer.vocab_size={config.vocab_size}"
    if found := re.search(r"value <= (\d+)", message):
        most = found[1]
        return f"{field} must not exceed the {most} pieces that the text can fill; try {most}, or give more text"
    if found := re.search(r"\d+ vs (\d+)", message):
        least = int(found[1])
        return f"{field} must hold 256 bytes, 4 marks and the text's characters, {least} in all; try {2 * least}"
    if "sentences_.empty()" in message:
        return f"{field} needs text in the training split to learn from; see corpus.path"
    return f"{field}: SentencePiece could not be trained ({message.strip().splitlines()[0]})"
