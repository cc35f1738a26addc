"""Text ↔ tokens: one interface, and SentencePiece byte-pair encoding that gives every Unicode text back exactly.

Kudo & Richardson, "SentencePiece: A simple and language independent subword tokenizer and detokenizer for Neural Text
Processing", EMNLP 2018. Four choices make it lossless: identity normalisation, no squeezing of spaces, no space put
before the text, and a token for each byte, for characters that the vocabulary lacks. A newline is always the one token
<0x0A>: no learned token contains one, so that lines and paragraphs can be told from the tokens.

Two things are ours. SentencePiece writes a space as U+2581, and so would read a real U+2581 back as a space: here it is
encoded as its three bytes, which any SentencePiece decoder understands. And since no token reaches over a space, the
tokens of each word are kept in a cache: several times faster than the library, and equal to it.

A model that was trained elsewhere may bring a `tokenizer.json` instead: see `json_tokenizer.py`.

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
from typing import Any, SupportsIndex

import numpy as np
import sentencepiece
from jaxtyping import UInt

from tale_jax.config import MIN_VOCAB_SIZE, TokenizerConfig
from tale_jax.utils.files import write_atomically

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
SPACE = "\u2581"  # how SentencePiece writes a space
MAX_CACHED_WORDS = 400_000  # about 100 MB
MAX_CACHED_WORD_CHARS = 64
MAX_TRAINING_WORD_CHARS = 4_000
_RESERVED = ("\t", "\0", SPACE, "\u2585")  # SentencePiece's trainer gives these characters a meaning of its own
_ROUND_TRIP_TEXT = f" Tab\tand  two spaces,\n\nline ends\r\n, {SPACE}, <s>, ① ﬁ e\u0301 ½, \U0001f9d9 \0\u200b. "


class Tokenizer:
    """What every tokenizer is. Make one with `load`, `read_tokenizer` or `train_tokenizer`.

    Special tokens that are written out in a text are text.

    Attributes:
      model: the bytes that `read_tokenizer` makes it of again.
      fingerprint: their SHA-256, in hexadecimal digits.
      vocab_size, bos_id, eos_id, pad_id, unk_id: of the model; an id that it lacks is -1.
      dtype: little-endian uint16, or uint32 where the vocabulary has more than 65,536 tokens.
      special_tokens: those that a chat template may write, and their ids; no text becomes one of them.
      token_bytes: for each id the UTF-8 bytes it stands for, perhaps half a character; b"" for BOS, EOS and PAD.
    """

    model: bytes
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    dtype: np.dtype[Any]
    special_tokens: dict[str, int]
    token_bytes: list[bytes]

    def __init__(self, model: bytes, vocab_size: int):
        self.model, self.vocab_size = model, vocab_size
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")

    @property
    def puts_bos(self) -> bool:
        """Whether the texts that its model was trained on begin with BOS."""
        return self.bos_id >= 0

    @staticmethod
    def load(path: Path | str) -> "Tokenizer":
        """Reads a SentencePiece .model file, or a tokenizer.json and the tokenizer_config.json beside it.

        Raises ValueError, in one line, when it is missing or is not one.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} does not exist; give a SentencePiece .model file (launch/prepare.py makes one)")
        if path.suffix != ".json":
            return SentencePieceTokenizer(path.read_bytes(), str(path))
        from tale_jax.data.json_tokenizer import JsonTokenizer

        return JsonTokenizer.load(path)

    def save(self, folder: Path) -> None:
        """Writes its file, or files, to a folder that exists."""
        raise NotImplementedError

    def encode(self, text: str) -> UInt[np.ndarray, " T"]:
        """Text → its tokens, of `dtype`, without BOS and EOS. Raises ValueError for half a surrogate pair."""
        raise NotImplementedError

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Tokens → text; BOS, EOS and PAD give nothing, and bytes that are no whole character give U+FFFD."""
        return b"".join([self.token_bytes[i] for i in ids]).decode(errors="replace")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, from the bytes of its file.

    Attributes:
      adds_space: whether the model itself puts a space before each text. `encode` never does.
    """

    def __init__(self, model: bytes, name: str = "tokenizer"):
        try:
            self._library = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._read_model(model)
        except (RuntimeError, ValueError, IndexError):  # the latter for tokens that no trainer makes
            raise ValueError(f"{name} must be a SentencePiece model; give a .model file") from None

    def _read_model(self, model: bytes) -> None:
        library = self._library
        super().__init__(model, library.vocab_size())
        self.bos_id, self.eos_id = library.bos_id(), library.eos_id()
        self.pad_id, self.unk_id = library.pad_id(), library.unk_id()
        self.special_tokens = {library.id_to_piece(i): i for i in range(self.vocab_size) if library.is_control(i)}
        self.token_bytes = [_token_bytes(library, i) for i in range(self.vocab_size)]
        self._space_ids = [library.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        # A foreign model may put a space before each text: it goes before a newline that is removed again.
        self.adds_space: bool = library.encode("a", out_type=str)[0].startswith(SPACE)
        self._prefix_ids: list[int] = library.encode("\n") if self.adds_space else []
        tokens = [library.id_to_piece(i) for i in range(self.vocab_size)]
        # Tokens of a foreign model may reach from word to word.
        words_are_independent = not any(SPACE in token[1:] or ("\n" in token and token != "\n") for token in tokens)
        self._word_cache = _WordCache(self) if words_are_independent else None

    def save(self, folder: Path) -> None:
        write_atomically(folder / MODEL_FILE, self.model)

    def encode(self, text: str) -> UInt[np.ndarray, " T"]:
        if self._word_cache is None:
            return np.array(self.encode_uncached(text), self.dtype)
        if len(self._word_cache) > MAX_CACHED_WORDS:
            self._word_cache.clear()
        tokens = b"".join(map(self._word_cache.__getitem__, _split_words(text)))
        return np.frombuffer(tokens, self.dtype, offset=len(self._word_cache["\n"]))

    def cache_words(self, words: Iterable[str]) -> None:
        """Encodes words, as `_split_words` makes them, into the cache: together in half the time."""
        if self._word_cache is None or self._prefix_ids:
            return
        words = [word for word in words if len(word) < MAX_CACHED_WORD_CHARS and SPACE not in word]
        for word, ids in zip(words, self._library.encode([_text_of(word) for word in words]), strict=True):
            self._word_cache[word] = np.array(ids, self.dtype).tobytes()

    def encode_uncached(self, text: str) -> list[int]:
        """Text → ids, without the cache of words."""
        if text.isascii():
            return self._encode_with_library(text)
        check_unicode(text)
        first, *rest = text.split(SPACE)
        ids = self._encode_with_library(first)
        for part in rest:
            ids += self._space_ids + self._encode_with_library(part)
        return ids

    def _encode_with_library(self, text: str) -> list[int]:
        if self._prefix_ids:
            return self._library.encode("\n" + text)[len(self._prefix_ids) :]
        return self._library.encode(text)


def read_tokenizer(model: bytes, name: str = "tokenizer") -> Tokenizer:
    """The tokenizer whose attribute `model` was `model`. Raises ValueError, in one line, when there is none."""
    if not model.startswith(b"{"):
        return SentencePieceTokenizer(model, name)
    from tale_jax.data.json_tokenizer import JsonTokenizer

    return JsonTokenizer(model, name)


def tokenizer_file(workdir: Path) -> Path:
    """Where an experiment keeps its tokenizer: one of ours, or one that came with a model from elsewhere."""
    folder = Path(workdir) / "tokenizer"
    return folder / JSON_FILE if (folder / JSON_FILE).is_file() else folder / MODEL_FILE


def check_unicode(text: str) -> None:
    """Raises ValueError, in one line, for half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"text {text[:40]!r} must not hold half a surrogate pair; remove it") from None


def _split_words(text: str) -> list[str]:
    """The words of a text, which starts as a line does: split at each space, which is left out, and before each
    newline, which begins its word."""
    return ("\n" + text.replace("\n", " \n")).split(" ")


def _text_of(word: str) -> str:
    """The part of the text that a word of `_split_words` stands for."""
    return word if word[:1] == "\n" else " " + word


class _WordCache(dict[str, bytes]):
    """Word, as `_split_words` makes them → its tokens, encoded when they are first asked for."""

    def __init__(self, tokenizer: SentencePieceTokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> bytes:
        tokens = np.array(self._tokenizer.encode_uncached(_text_of(word)), self._tokenizer.dtype).tobytes()
        if len(word) < MAX_CACHED_WORD_CHARS:
            self[word] = tokens
        return tokens


def train_tokenizer(documents: Iterable[str], config: TokenizerConfig) -> SentencePieceTokenizer:
    """Learns a vocabulary of `config.vocab_size` tokens from documents, of which at most `sample_bytes` are used.

    The result depends on the documents and the settings only. Memory: about the sample, and a table of its words.

    Raises:
      ValueError: one line, when the text is too small, or has too many characters, for such a vocabulary.
    """
    word_counts = collections.Counter[str]()
    for text in sample_evenly(documents, config.sample_bytes):
        word_counts.update(_split_words(text))
    try:
        tokenizer = SentencePieceTokenizer(_train(word_counts, config.vocab_size))
    except RuntimeError as error:
        raise ValueError(_training_error(str(error), word_counts, config)) from None
    tokenizer.cache_words(itertools.islice(word_counts, MAX_CACHED_WORDS))
    return tokenizer


def fillable_vocab_size(documents: Iterable[str], vocab_size: int) -> int:
    """`vocab_size`, or the nearest that documents, which are few, have characters and words for."""
    word_counts = collections.Counter[str]()
    for text in documents:
        word_counts.update(_split_words(text))
    low, high = _vocab_limits(word_counts, vocab_size)
    return max(min(max(vocab_size, low), high), MIN_VOCAB_SIZE)


def _train(word_counts: Mapping[str, int], vocab_size: int) -> bytes:
    """The model file. Raises RuntimeError with SentencePiece's words."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_training_rows(word_counts),
        input_format="tsv",
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        max_sentence_length=1 << 16,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=4,  # silent: errors are raised
    )
    return model.getvalue()


def check_tokenizer(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """What a model given as `tokenizer.path` must have. Raises ValueError, in one line, when it does not."""
    name = f"tokenizer.path={config.path}"
    for special_token in ("bos_id", "eos_id"):
        if getattr(tokenizer, special_token) < 0:
            raise ValueError(
                f"{name} must have a {special_token}, to separate documents; give another, or "
                '--config.tokenizer.path=""'
            )
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={config.vocab_size} must be that of {name}; "
            f"try --config.tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    if (decoded := tokenizer.decode(tokenizer.encode(_ROUND_TRIP_TEXT))) != _ROUND_TRIP_TEXT:
        raise ValueError(
            f"{name} must give every text back, but makes {decoded!r} of {_ROUND_TRIP_TEXT!r}; give a model with "
            'byte_fallback, identity normalisation and remove_extra_whitespaces=False, or --config.tokenizer.path="" '
            "to train one"
        )


def sample_evenly(documents: Iterable[str], max_bytes: int) -> list[str]:
    """Every k-th document, with the smallest power of two k for which they are at most `max_bytes` together.

    One pass and no random numbers: when the sample is larger than its limit, every second document is dropped.
    """
    sample: list[tuple[str, int]] = []
    total, step = 0, 1
    for index, text in enumerate(documents):
        if index % step:
            continue
        sample.append((text, len(text.encode())))
        total += sample[-1][1]
        while total > max_bytes and len(sample) > 1:
            sample, step = sample[::2], 2 * step
            total = sum(size for _, size in sample)
    return [text[:max_bytes] for text, _ in sample]


def _training_rows(word_counts: Mapping[str, int]) -> Iterator[str]:
    """Words and how often they occur, in the trainer's format: the same as the text itself, only faster."""
    for word, count in word_counts.items():
        text = _text_of(word).lstrip("\n")
        for character in _RESERVED:
            text = text.replace(character, "")
        if text:
            yield f"{text[:MAX_TRAINING_WORD_CHARS]}\t{count}"


def _token_bytes(library: sentencepiece.SentencePieceProcessor, index: int) -> bytes:
    token = library.id_to_piece(index)
    if library.is_control(index):
        return b""
    if library.is_byte(index):
        return bytes([int(token[3:5], 16)])
    return "\ufffd".encode() if library.is_unknown(index) else token.replace(SPACE, " ").encode()


_TOO_LARGE = re.compile(r"value <= (\d+)")
_TOO_SMALL = re.compile(r"\d+ vs (\d+)")


def _vocab_limits(word_counts: Mapping[str, int], vocab_size: int) -> tuple[int, int]:
    """The smallest and the largest vocabulary that the words allow, as far as `vocab_size` or its double is not."""
    low, high = 1, 2 * vocab_size
    for _ in range(2):
        try:
            _train(word_counts, vocab_size)
            return low, max(high, vocab_size)
        except RuntimeError as error:
            if found := _TOO_LARGE.search(str(error)):
                return low, int(found[1])
            if not (found := _TOO_SMALL.search(str(error))):
                return low, high
            low = int(found[1])
            vocab_size = 2 * low
    return low, max(high, low)


def _training_error(message: str, word_counts: Mapping[str, int], config: TokenizerConfig) -> str:
    """What SentencePiece's trainer said, in our words where we know the case; the advice is within what is possible."""
    field = f"tokenizer.vocab_size={config.vocab_size}"
    if found := _TOO_LARGE.search(message):
        max_size = int(found[1])
        return (
            f"{field} must not exceed the {max_size} tokens that the text can fill; try "
            f"--config.tokenizer.vocab_size={max_size}, or give more text"
        )
    if found := _TOO_SMALL.search(message):
        low, high = _vocab_limits(word_counts, config.vocab_size)
        needs = f"256 bytes, 4 special tokens and the text's characters, {low} in all"
        return f"{field} must hold {needs}; try --config.tokenizer.vocab_size={max(low, min(2 * low, high))}"
    if "sentences_.empty()" in message:
        return f"{field} needs text in the training split to learn from; give text with words in corpus.path"
    return f"{field}: SentencePiece could not be trained ({message.strip().splitlines()[0]})"
