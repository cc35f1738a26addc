"""The answers to completions and chat completions, whole or as chunks of a stream, in OpenAI's shapes.

Beside OpenAI's fields: `step` and `seed` of the answer, so that it can be asked for again, and `token_details` of a
choice where the request asks for them.
"""

import dataclasses
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tale_jax.serve.engine import Delta, Prompt, TokenScore
from tale_jax.serve.inspect import token_json
from tale_jax.serve.models import Model

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclasses.dataclass
class Answer:
    """What all choices of a request share.

    Attributes:
      model: that writes.
      values: of the request, as `schema.read` gives them.
      chat: chat completions; otherwise completions.
      about: more fields of the answer: `step`, `seed`.
      prompt_tokens: read, for all prompts together.
    """

    model: Model
    values: Mapping[str, Any]
    chat: bool
    about: Mapping[str, Any]
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self):
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        self.with_usage = bool((self.values["stream_options"] or {}).get("include_usage"))
        logprobs = self.values["logprobs"]
        self.with_logprobs = bool(logprobs) if self.chat else logprobs is not None
        top = self.values["top_logprobs"] if self.chat else logprobs
        self.top = int(top or 0)  # likeliest tokens to tell
        self.scored = self.with_logprobs or self.values["token_details"]

    def chunk(self, choices: Sequence[Mapping[str, Any]], usage: bool = False) -> dict[str, Any]:
        """A part of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        result = self._head(kind) | {"choices": list(choices)}
        return result | {"usage": self.usage() if usage else None} if self.with_usage else result

    def whole(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": list(choices), "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return counts | {"total_tokens": total}

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}
        return head | dict(self.about)


class Choice:
    """One text of an answer, as it grows."""

    def __init__(self, answer: Answer, index: int, prompt: str):
        self.answer, self.index = answer, index
        self.finish_reason: str | None = None
        self._begin = prompt if not answer.chat and answer.values["echo"] else ""
        self._base, self._end, self._started = len(self._begin), 0, False
        self._parts: list[str] = []
        self._scores: list[tuple[TokenScore, int]] = []  # with where its text begins
        self._num_tokens = 0

    def add(self, event: Prompt | Delta) -> tuple[str, list[tuple[TokenScore, int]]]:
        """Takes an event in; returns the new text and the new tokens, each with the offset of its text."""
        if isinstance(event, Prompt):
            text, base, end = self._begin, 0, 0
        else:
            text, base, end = event.text, self._base, self._end
            self.finish_reason = event.finish_reason
            self.answer.completion_tokens += event.num_tokens - self._num_tokens
            self._num_tokens = event.num_tokens
        new = []
        for score in event.tokens:
            new.append((score, base + end))
            end = score.end
        if isinstance(event, Delta):
            self._end = end
        self._parts.append(text)
        self._scores += new
        return text, new

    def chunk(self, event: Prompt | Delta) -> dict[str, Any] | None:
        """The event as a choice of a chunk; None where it brings nothing."""
        text, new = self.add(event)
        if isinstance(event, Prompt) and not text and not new and not self.answer.chat:
            return None
        result: dict[str, Any] = {"index": self.index}
        if self.answer.chat:
            delta: dict[str, Any] = {} if self._started else {"role": "assistant"}
            if text or not self._started:
                delta["content"] = text
            self._started = True
            result["delta"] = delta
        else:
            result["text"] = text
        return result | self._tail(new)

    def whole(self) -> dict[str, Any]:
        text = "".join(self._parts)
        result: dict[str, Any] = {"index": self.index}
        if self.answer.chat:
            result["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            result["text"] = text
        return result | self._tail(self._scores)

    def _tail(self, scores: Sequence[tuple[TokenScore, int]]) -> dict[str, Any]:
        answer, reason = self.answer, self.finish_reason
        logprobs = None
        if answer.with_logprobs:
            logprobs = self._chat_logprobs(scores) if answer.chat else self._logprobs(scores)
        tail: dict[str, Any] = {"logprobs": logprobs, "finish_reason": reason and FINISH[reason]}
        if answer.values["token_details"]:
            tail["token_details"] = [
                self._detail(score.id, score.before, score.after)
                | {"offset": offset, "top": [self._detail(*other) for other in score.top[: answer.top]]}
                for score, offset in scores
            ]
        return tail

    def _detail(self, token: int, before: float | None, after: float | None) -> dict[str, Any]:
        after = None if after is None or after == float("-inf") else after
        return token_json(self.answer.model, token) | {"logprob": before, "logprob_after": after}

    def _logprobs(self, scores: Iterable[tuple[TokenScore, int]]) -> dict[str, Any]:
        """The shape of completions: lists side by side; texts of tokens are keys."""
        tokens, values, offsets, tops = [], [], [], []
        for score, offset in scores:
            name = token_name(self.answer.model, score.id)
            top: dict[str, float | None] = {}
            for other, before, _ in score.top[: self.answer.top]:
                top.setdefault(token_name(self.answer.model, other), before)
            top.setdefault(name, score.before)
            tokens.append(name)
            values.append(score.before)
            offsets.append(offset)
            tops.append(None if score.before is None else top)
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops if self.answer.top else None,
            "text_offset": offsets,
        }

    def _chat_logprobs(self, scores: Iterable[tuple[TokenScore, int]]) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            content = self.answer.model.tokenizer.token_bytes[token]
            return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}

        content = [
            entry(score.id, score.before)
            | {"top_logprobs": [entry(other, before) for other, before, _ in score.top[: self.answer.top]]}
            for score, _ in scores
            if score.id != self.answer.model.tokenizer.eos_id
        ]
        return {"content": content, "refusal": None}


def token_name(model: Model, token: int) -> str:
    """The text of a token as completions name it: `bytes:\\xe2` for half a character, `</s>` for a special token."""
    tokenizer = model.tokenizer
    special = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>", tokenizer.pad_id: "<pad>", tokenizer.unk_id: "<unk>"}
    if token in special:
        return special[token]
    content = tokenizer.token_bytes[token] if token < tokenizer.vocab_size else b""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
