"""Messages to token ids, by the chat template of a workdir: Jinja, as Hugging Face has it, in a sandbox.

A template writes `bos_token` and `eos_token`, which stand for marks that no text can hold, so that a message cannot end
a turn that is not its own.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from tale_jax.data.tokenizer import Tokenizer
from tale_jax.serve.schema import Invalid

MAX_TEXT = 4_000_000  # characters of a conversation written out


class TemplateRefusal(Exception):
    """What a template raises with `raise_exception`."""


def encode_chat(template: str, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation, with BOS, up to where the assistant's answer begins. Raises Invalid."""
    import jinja2.sandbox

    def refuse(message: str) -> None:
        raise TemplateRefusal(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    bos, eos = (f"\0{kind}{secrets.token_hex(16)}\0" for kind in ("bos", "eos"))
    marks: dict[str, Any] = {bos: tokenizer.bos_id, eos: tokenizer.eos_id}
    try:
        text = environment.from_string(template).render(
            messages=[dict(message) for message in messages], bos_token=bos, eos_token=eos, add_generation_prompt=True
        )
    except TemplateRefusal as error:
        raise Invalid(f"messages are refused by the chat template: {error}", "messages") from None
    except (jinja2.TemplateError, TypeError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise Invalid(f"messages do not suit the chat template ({type(error).__name__})", "messages") from None
    if len(text) > MAX_TEXT:
        raise Invalid("messages are too long", "messages", 413)
    ids: list[int] = []
    for part in re.split(f"({re.escape(bos)}|{re.escape(eos)})", text):
        ids += [marks[part]] if part in marks else tokenizer.encode(part).tolist()
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]
