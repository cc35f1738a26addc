"""Rows of conversations: the shapes they come in, what each must have, and the tokens they become.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "tools": […]}
    {"prompt": "…", "completion": "…"}       or "response"; either may also be a list of messages

A row that has the text called `corpus.field` is text as ever. A conversation travels as the text of a document: one
JSON object with its messages, and its tools where it has any, written in one way only. So conversations are shared out
to splits, and compared, as other documents are.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tale_jax.data.chat_template import ChatError, ChatTemplate
from tale_jax.data.marks import DTYPE, FIRST, LEARNED

CHAT_FIELD = "messages"  # as corpus.field: rows are conversations, of whichever shape
COLUMNS = ("messages", "tools", "prompt", "completion", "response")
ROLES = ("system", "developer", "user", "assistant", "tool")
# Who may speak after whom; "" is the beginning.
FOLLOWS = {
    "system": ("",),
    "developer": ("", "system"),
    "user": ("", "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether a row has the fields of a conversation."""
    return "messages" in row or ("prompt" in row and ("completion" in row or "response" in row))


def conversation(row: Mapping[str, Any], place: str) -> str:
    """A row as the text of a document. Raises ValueError, in one line that begins with `place`, for what is none."""
    if not is_conversation(row):
        known = ", ".join(str(name)[:40] for name in list(row)[:8]) or "no field"
        raise ValueError(
            f"{place} must have messages, or prompt and completion (or response), as the rows before it; it has "
            f"{known}; correct or remove it"
        )
    if "messages" in row:
        messages = row["messages"]
    else:
        answer = "completion" if "completion" in row else "response"
        messages = [*_as_messages(row["prompt"], "user"), *_as_messages(row[answer], "assistant")]
    kept: dict[str, Any] = {"messages": _checked(messages, place)}
    if tools := _without_none(row.get("tools")):
        kept["tools"] = _objects(tools, f"{place}: tools")
    text = json.dumps(kept, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}: messages must not hold half a surrogate pair; correct or remove it") from None
    return text


def _as_messages(value: Any, role: str) -> list[Any]:
    return list(value) if isinstance(value, list) else [{"role": role, "content": value}]


def _checked(messages: Any, place: str) -> list[dict[str, Any]]:
    """The messages with what is known of them alone. Raises ValueError, in one line, for the first that cannot be."""
    if isinstance(messages, np.ndarray):
        messages = messages.tolist()
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: messages must be an array of objects, not empty; correct or remove it")
    checked, before = [], ""
    for number, message in enumerate(messages, 1):
        where = f"{place}: message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} must be an object with role and content; correct or remove it")
        role = message.get("role")
        if not isinstance(role, str) or role not in FOLLOWS:
            raise ValueError(f"{where}: role={_short(role)} must be one of {', '.join(ROLES)}; correct or remove it")
        if before not in FOLLOWS[role]:
            after = f"follow {' or '.join(name or 'nothing' for name in FOLLOWS[role])}"
            raise ValueError(
                f"{where}: role={role} must {after}, but {f'follows {before}' if before else 'is the first'}; put the "
                "messages in order, or remove the row"
            )
        calls = _objects(_without_none(message.get("tool_calls")) or [], f"{where}: tool_calls")
        content = _text_of(message.get("content"), where)
        if not content.strip() and not calls and role != "tool":
            what = "response" if role == "assistant" else "content"
            raise ValueError(f"{where}: the {what} of {role} must not be empty; fill it in, or remove the row")
        kept = {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}
        checked.append({"role": role, "content": content, **kept, **({"tool_calls": calls} if calls else {})})
        before = role
    if before != "assistant":
        raise ValueError(
            f"{place}: messages must end with an answer of assistant, but end with {before}; remove what stands after "
            "the last answer, or the row"
        )
    return checked


def _text_of(content: Any, where: str) -> str:
    """A content, which may be a list of parts of text. Raises ValueError, in one line, for anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise ValueError(f"{where}: content must be text; pictures and sound cannot be learned: correct or remove it")


def _objects(values: Any, what: str) -> list[Any]:
    """The values, an array of objects. Raises ValueError, in one line that begins with `what`, for anything else."""
    if isinstance(values, list) and all(isinstance(value, dict) for value in values):
        return values
    raise ValueError(f"{what} must be an array of objects; correct or remove it")


def _without_none(value: Any) -> Any:
    """Without the fields that parquet fills in with null where only other rows have them."""
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_without_none(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def contents(document: str) -> Iterator[str]:
    """What the messages of a conversation say."""
    return (message["content"] for message in json.loads(document)["messages"] if message["content"])


def answers(document: str) -> str:
    """What the assistant says."""
    messages = json.loads(document)["messages"]
    return "\n".join(message["content"] for message in messages if message["role"] == "assistant")


class ChatCounts(NamedTuple):
    """What a prepared split has of conversations: rows, tokens that are learned, and sequences whose end no window of
    the context holds."""

    rows: int = 0
    learned: int = 0
    truncated: int = 0


def encode_conversation(template: ChatTemplate, document: str) -> list[np.ndarray]:
    """The marked tokens of a conversation: one sequence, or several (see `ChatTemplate.learned`).

    Raises ValueError, in one line, for a conversation that the template refuses.
    """
    kept = json.loads(document)
    try:
        sequences = template.learned(kept["messages"], kept.get("tools"))
    except ChatError as error:
        raise ChatError(
            f"the conversation that begins with {_short(kept['messages'][0]['content'])}: {error}"
        ) from None
    encoded = []
    for ids, learned in sequences:
        tokens = np.array(ids, DTYPE) | np.where(learned, LEARNED, 0).astype(DTYPE)
        tokens[0] |= FIRST
        encoded.append(tokens)
    return encoded


def prompt_of(messages: Sequence[Mapping[str, Any]], tail: int) -> list[Mapping[str, Any]]:
    """The messages of the system, and the last `tail` of the others, from one of the user on."""
    system = [message for message in messages if message["role"] in ("system", "developer")]
    others = [message for message in messages if message["role"] not in ("system", "developer")][-tail:]
    while others and others[0]["role"] != "user":
        others = others[1:]
    return [*system, *others]
