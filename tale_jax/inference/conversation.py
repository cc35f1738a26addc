"""A conversation with a model: what was said is read again at each turn, by the chat template of the workdir.

    conversation = Conversation(sampler, ChatTemplate(tokenizer, template), system="Be kind.")
    prompt_loop(conversation.stream, conversation.show, SampleSettings(), on_new=conversation.clear)

A long one is windowed: when it does not fit the context, with room for an answer, its oldest turns are no longer read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tale_jax.data.chat_template import ChatTemplate, read_template
from tale_jax.inference.chat import print_samples
from tale_jax.inference.sampler import Generation, Sampler, SampleSettings
from tale_jax.utils.paths import printable_path
from tale_jax.utils.streams import notice


class Conversation:
    """What was said so far. `stream` and `show` are as `prompt_loop` calls them.

    Args:
      sampler: of the model.
      template: of the workdir.
      system: what the model reads before all turns; "": nothing.
      facts: of the model, for `--json`.
    """

    def __init__(self, sampler: Sampler, template: ChatTemplate, system: str = "", **facts: Any):
        self._sampler, self._template, self._facts = sampler, template, facts
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        self._asked = ""

    def clear(self) -> None:
        """Forgets all turns."""
        self._turns.clear()

    def stream(self, prompt: str, settings: SampleSettings, seed: int = 0) -> Generation:
        """The answer to a message. Raises ValueError, in one line, for one that is longer than the context."""
        ids, dropped = self._window([*self._turns, {"role": "user", "content": prompt}], settings.max_tokens)
        if dropped:
            notice(f"({dropped} earlier message{'s' * (dropped != 1)} no longer fit the context, and are not read)")
        generation = self._sampler.stream("", settings, seed=seed, ids=ids)
        self._asked = prompt
        return generation

    def show(
        self, generation: Generation, should_stop: Callable[[], bool] = lambda: False, as_json: bool = False
    ) -> None:
        """Prints the answer while it is written, and remembers it."""
        parts: list[str] = []
        if as_json:
            generation.prompt = self._asked
        print_samples(generation, as_json, should_stop, parts.append, **self._facts)
        self._turns += [{"role": "user", "content": self._asked}, {"role": "assistant", "content": "".join(parts)}]

    def _window(self, turns: list[dict[str, str]], max_tokens: int) -> tuple[list[int], int]:
        """The ids of the newest turns that leave room for an answer, and how many turns are left out."""
        room = self._sampler.context - min(max_tokens, self._sampler.context // 4)
        dropped = 0
        while True:
            ids = self._template.prompt([*self._system, *turns[dropped:]])
            if len(ids) <= room or dropped + 2 >= len(turns):
                break
            dropped += 2  # a question and its answer
        if len(ids) > self._sampler.context:
            raise ValueError(
                f"the message must fit the context of {self._sampler.context} tokens, but is {len(ids)} with what the "
                "chat template adds; shorten it"
            )
        return ids, dropped


def open_conversation(
    sampler: Sampler, workdir: Path, system: str = "", num_samples: int = 1, **facts: Any
) -> Conversation:
    """A conversation by the template of a workdir. Raises ValueError, in one line, where there is none."""
    template = read_template(workdir, sampler.tokenizer)
    if not template:
        raise ValueError(
            f"--chat needs a chat template, and workdir={printable_path(workdir)} has none; fine-tune it on "
            "conversations, or leave out --chat"
        )
    if num_samples != 1:
        raise ValueError(f"num_samples={num_samples} must be 1 with --chat; leave it out")
    return Conversation(sampler, ChatTemplate(sampler.tokenizer, template), system, **facts)
