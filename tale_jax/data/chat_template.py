"""Conversations → tokens, by the chat template of a workdir: Jinja, as Hugging Face has it.

`tokenizer/chat_template.jinja` is ours where a model brought none: as in ChatML each turn begins with a mark and the
name of who speaks and ends with another mark, but the marks are the model's own BOS and EOS, which every vocabulary
has. A template that came with a model is rendered in another process with limits (`template_worker.py`).

No text of a conversation is ever read as a special token. A template writes those out as text, `<|im_end|>`, and so
may a user: what a user wrote is broken up by a secret before the template is rendered, and put together again
afterwards, when the special tokens that are left have been found.

    template = ChatTemplate(tokenizer, template_of(workdir))
    template.prompt([{"role": "user", "content": "Who had the coin?"}])          # ids, up to where the answer begins
    template.learned(messages)                                                   # [(ids, which are learned), …]
"""

import itertools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tale_jax.data.tokenizer import Tokenizer
from tale_jax.utils.extras import has_library, missing_extra
from tale_jax.utils.files import write_atomically
from tale_jax.utils.subprocesses import LineProcess

TEMPLATE_FILE = "chat_template.jinja"
DEFAULT_TEMPLATE = """\
{% if tools %}{{ bos_token }}tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{ eos_token }}
{% endif %}
{% for message in messages %}{{ bos_token }}{{ message['role'] }}
{{ message['content'] or '' }}{% for call in message['tool_calls'] or [] %}
<tool_call>{{ call | tojson }}</tool_call>{% endfor %}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}{{ bos_token }}assistant
{% endif %}"""
MAX_WAIT = 60  # seconds for a template, should its process not end by its own limit


class ChatError(ValueError):
    """A conversation that a template refuses, or a template that cannot be used: one line."""


def read_template(workdir: Path, tokenizer: Tokenizer) -> str:
    """The template that a workdir keeps, or that came with its tokenizer; "" where there is none."""
    path = Path(workdir) / "tokenizer" / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    kept = getattr(tokenizer, "settings", {}).get("chat_template")
    return kept if isinstance(kept, str) else ""


def keep_template(workdir: Path, tokenizer: Tokenizer) -> str:
    """The template of a workdir, which is written where there is none."""
    if template := read_template(workdir, tokenizer):
        return template
    write_atomically(Path(workdir) / "tokenizer" / TEMPLATE_FILE, DEFAULT_TEMPLATE)
    return DEFAULT_TEMPLATE


class ChatTemplate:
    """A template and the tokenizer whose special tokens it writes. Raises ChatError, in one line, for what it refuses.

    Attributes:
      template: Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, template: str):
        self._tokenizer, self.template = tokenizer, template
        self._special = tokenizer.special_tokens
        texts = {index: text for text, index in self._special.items()}
        self._names = {
            f"{mark}_token": texts.get(getattr(tokenizer, f"{mark}_id"), "") for mark in ("bos", "eos", "pad", "unk")
        }
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if self._special else None

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins."""
        secret = _secret()
        [text] = self._render([(self._hidden(messages, secret), self._hidden(tools, secret), True)])
        return self._with_bos([index for index, _ in self._tokens(text, secret)])

    def learned(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> list[tuple[list[int], list[bool]]]:
        """Token ids of a conversation, and which of them the assistant writes: the end of its turn is one of these.

        It is one sequence, unless the template writes earlier turns in another way than it wrote them when they were
        the last: each answer is then a sequence of its own, as it will be asked for.
        """
        secret = _secret()
        messages, tools = self._hidden(messages, secret), self._hidden(tools, secret)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        renders = [(messages, tools, False)]
        for i in answers:
            renders += [(messages[:i], tools, True), (messages[: i + 1], tools, False)]
        whole, *parts = self._render(renders)
        spans: list[tuple[str, int, int]] = []
        for before, after in zip(parts[::2], parts[1::2], strict=True):
            if not after.startswith(before):
                raise ChatError(
                    "the chat template must begin an answer as add_generation_prompt does; correct it, or remove "
                    f"{TEMPLATE_FILE} for a plain one"
                )
            spans.append((after, len(before), len(after)))
        if all(whole.startswith(after) for after, _, _ in spans):
            return [self._with_marks(whole, [(begin, end) for _, begin, end in spans], secret)]
        return [self._with_marks(after, [(begin, end)], secret) for after, begin, end in spans]

    def _with_marks(self, text: str, spans: list[tuple[int, int]], secret: str) -> tuple[list[int], list[bool]]:
        """The tokens of a text, and which of them lie in the spans; they are encoded apart, as an answer will be."""
        ids: list[int] = []
        learned: list[bool] = []
        edges = [0, *itertools.chain.from_iterable(spans), len(text)]
        for number, (begin, end) in enumerate(itertools.pairwise(edges)):
            tokens = self._tokens(text[begin:end], secret)
            last = max((i for i, (_, special) in enumerate(tokens) if special), default=len(tokens) - 1)
            ids += [index for index, _ in tokens]
            learned += [number % 2 == 1 and i <= last for i in range(len(tokens))]  # not the line end behind the mark
        with_bos = self._with_bos(ids)
        return with_bos, [False] * (len(with_bos) - len(ids)) + learned

    def _with_bos(self, ids: list[int]) -> list[int]:
        """With BOS, where the model's texts begin with it and the template does not write it."""
        bos = self._tokenizer.bos_id
        return [bos, *ids] if self._tokenizer.puts_bos and ids[:1] != [bos] else ids

    def _tokens(self, text: str, secret: str) -> list[tuple[int, bool]]:
        """The tokens of a rendered text, and which are special: those that the template wrote."""
        tokens: list[tuple[int, bool]] = []
        at = 0
        for found in self._pattern.finditer(text) if self._pattern else ():
            tokens += self._plain(text[at : found.start()], secret)
            tokens.append((self._special[found[0]], True))
            at = found.end()
        return tokens + self._plain(text[at:], secret)

    def _plain(self, text: str, secret: str) -> list[tuple[int, bool]]:
        return [(index, False) for index in self._tokenizer.encode(text.replace(secret, "")).tolist()]

    def _hidden(self, value: Any, secret: str) -> Any:
        """Everything that people wrote, so that no special token can be found in it."""
        if isinstance(value, str):
            return self._broken_up(value, secret)
        if isinstance(value, Mapping):
            return {self._hidden(key, secret): self._hidden(item, secret) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self._hidden(item, secret) for item in value]
        return value

    def _broken_up(self, text: str, secret: str) -> str:
        if self._pattern is None:
            return text
        text = self._pattern.sub(lambda found: found[0][:1] + secret + found[0][1:], text)
        # Nor may the template complete what a text only begins, or ends.
        for token in self._special:
            if any(text.endswith(token[:size]) for size in range(1, len(token))):
                text = f"{text[:-1]}{text[-1:]}{secret}"
                break
        for token in self._special:
            if any(text.startswith(token[size:]) for size in range(1, len(token))):
                return secret + text
        return text

    def _render(self, renders: list[tuple[Any, Any, bool]]) -> list[str]:
        if self.template == DEFAULT_TEMPLATE:
            return [
                _default_text(*arguments, self._names["bos_token"], self._names["eos_token"]) for arguments in renders
            ]
        if not has_library("jinja2"):
            raise ChatError(missing_extra("a chat template that came with a model", "jinja2", "convert"))
        request = {"template": self.template, "special": self._names, "renders": renders}
        answer = _worker.ask(json.dumps(request), MAX_WAIT)
        result: dict[str, Any] = json.loads(answer) if answer else {"error": "it takes too much time or memory"}
        if "refused" in result:
            raise ChatError(f"the chat template refuses this conversation: {result['refused']}; correct or remove it")
        if "error" in result:
            raise ChatError(
                f"the chat template cannot be used: {result['error']}; correct {TEMPLATE_FILE} in tokenizer/, or "
                "replace it by that of another workdir"
            )
        return result["texts"]


def _default_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, asks: bool, bos: str, eos: str
) -> str:
    """What `DEFAULT_TEMPLATE` gives, which is known to be harmless, without Jinja."""

    def to_json(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    parts = []
    if tools:
        parts += [f"{bos}tools\n", *(f"{to_json(tool)}\n" for tool in tools), f"{eos}\n"]
    for message in messages:
        parts += [f"{bos}{message['role']}\n", message.get("content") or ""]
        parts += [f"<tool_call>{to_json(call)}</tool_call>" for call in message.get("tool_calls") or ()]
        parts.append(f"{eos}\n")
    return "".join([*parts, f"{bos}assistant\n" if asks else ""])


def _secret() -> str:
    """Letters and digits, so that no filter of a template changes them; nobody can guess them."""
    return f"x{secrets.token_hex(16)}x"


_worker = LineProcess("tale_jax.data.template_worker")
