"""A `tokenizer.json` behind our one tokenizer interface, for models that were trained elsewhere.

The `tokenizers` library reads the file and does the encoding: byte-level byte-pair encoding (as GPT-2, SmolLM2 and
Qwen have it) and SentencePiece's spelling of spaces and bytes (Llama). What the library does not say, the bytes of each
token, is read from the file: text can then be streamed token by token. Needs the extra `convert`.

    tokenizer = JsonTokenizer.load(workdir / "tokenizer" / "tokenizer.json")

Which tokens begin and end a document stands in the `tokenizer_config.json` beside it, as in a Hugging Face folder.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import UInt

from tale_jax.data.tokenizer import JSON_FILE, SPACE, Tokenizer, check_unicode
from tale_jax.utils.extras import missing_extra
from tale_jax.utils.files import json_object, write_atomically

SETTINGS_FILE = "tokenizer_config.json"
KINDS = ("BPE", "Unigram")
MARKS = ("bos", "eos", "pad", "unk")


class JsonTokenizer(Tokenizer):
    """A tokenizer.json with its settings.

    Attributes:
      text: the content of tokenizer.json; specification: the same, read.
      settings: the content of tokenizer_config.json.
      byte_level: whether its tokens are spelled in GPT-2's 256 characters for bytes.
      special_ids: tokens that no text becomes.
    """

    def __init__(self, model: bytes, name: str = "tokenizer"):
        """`model` is one JSON object, of the two files by name: see `pack`."""
        files = json.loads(model)
        self.text, self.settings = files[JSON_FILE], files[SETTINGS_FILE]
        self.specification = json_object(self.text, name, "copy it again")
        kind = (self.specification.get("model") or {}).get("type")
        if kind not in KINDS:
            raise ValueError(f"{name}: a tokenizer of type {kind} must be one of {', '.join(KINDS)}; use another base")
        self.library = _library_tokenizer(self.text, name)
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        super().__init__(model, 1 + max(vocabulary.values(), default=0))
        added = self.library.get_added_tokens_decoder()
        self.special_ids = {index for index, token in added.items() if token.special}
        self.added = {index: token.content for index, token in added.items()}
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            vocabulary.get(_content(self.settings.get(f"{mark}_token")), -1) for mark in MARKS
        )
        self.special_ids |= {i for i in (self.bos_id, self.eos_id, self.pad_id, self.unk_id) if i >= 0}
        self.special_tokens = {token: i for token, i in vocabulary.items() if i in self.special_ids}
        decoders = list(_parts(self.specification.get("decoder"), "decoders"))
        self.byte_level = any(part["type"] == "ByteLevel" for part in decoders)
        self._strips_space = any(part["type"] == "Strip" for part in decoders) or any(
            part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in decoders
        )
        self.token_bytes = [b""] * self.vocab_size
        for token, index in vocabulary.items():
            self.token_bytes[index] = self._bytes_of(token, index)

    @staticmethod
    def load(path: Path | str) -> "JsonTokenizer":
        """Reads tokenizer.json and, where there is one, the tokenizer_config.json beside it."""
        path = Path(path)
        beside = path.with_name(SETTINGS_FILE)
        settings = json_object(beside.read_bytes(), beside, "copy it again") if beside.is_file() else {}
        return JsonTokenizer(pack(path.read_bytes(), settings, str(path)), str(path))

    @property
    def puts_bos(self) -> bool:
        return self.bos_id >= 0 and self.library.encode("a", add_special_tokens=True).ids[:1] == [self.bos_id]

    def save(self, folder: Path) -> None:
        settings = json.dumps(self.settings, indent=2, ensure_ascii=False)
        write_atomically(folder / SETTINGS_FILE, settings + "\n")
        write_atomically(folder / JSON_FILE, self.text)

    def encode(self, text: str) -> UInt[np.ndarray, " T"]:
        check_unicode(text)
        return np.array(self.library.encode(text, add_special_tokens=False).ids, self.dtype)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        text = super().decode(ids)
        return text[1:] if self._strips_space and text.startswith(" ") else text

    def _bytes_of(self, token: str, index: int) -> bytes:
        if index in self.special_ids:
            return b""
        if index in self.added:
            return token.encode()
        if self.byte_level:
            characters = byte_characters()
            return bytes(characters[c] for c in token if c in characters)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()


def pack(specification: bytes | str, settings: Mapping[str, Any], name: str = "tokenizer") -> bytes:
    """The bytes that a `JsonTokenizer` is made of: its two files in one."""
    try:
        text = specification if isinstance(specification, str) else specification.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{name} must be JSON in UTF-8; give the tokenizer.json of a model") from None
    return json.dumps({JSON_FILE: text, SETTINGS_FILE: dict(settings)}).encode()


@functools.cache
def byte_characters() -> dict[str, int]:
    """GPT-2's character for each byte: itself where it can be seen, else one from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _parts(component: Mapping[str, Any] | None, inside: str) -> Iterator[Mapping[str, Any]]:
    """A component of tokenizer.json, or those in its sequence."""
    if component and component.get("type") == "Sequence":
        for part in component.get(inside, ()):
            yield from _parts(part, inside)
    elif component:
        yield component


def _content(token: Any) -> Any:
    """A token as tokenizer_config.json names it: the text, or an object that has it."""
    return token.get("content") if isinstance(token, Mapping) else token


def _library_tokenizer(text: str, name: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(missing_extra(name, "tokenizers", "convert")) from None
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{name} is not a tokenizer.json that can be read ({reason}); copy it again") from None
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = True  # special tokens that stand in a text are text
    return library
