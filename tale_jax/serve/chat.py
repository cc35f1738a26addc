"""Messages of a request to token ids, by the chat template of a workdir (see `data/chat_template.py`)."""

from collections.abc import Mapping, Sequence

from tale_jax.data.chat_template import ChatError, ChatTemplate
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.serve.schema import Invalid


def encode_chat(template: str, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation, with BOS, up to where the assistant's answer begins. Raises Invalid."""
    try:
        return ChatTemplate(tokenizer, template).prompt(messages)
    except ChatError as error:
        raise Invalid(f"messages: {error}", "messages") from None
