"""Questions about a tale whose answers the grammar knows: who had the coin, who told whom, who helped.

    for question in ask(grammar.tell(0).text):
        print(question.text, question.answer)

The grammar reads the tale back and so knows the world in it. `conversation_about` makes a chat of a tale and of some of
its questions: the corpus `tales_chat`.
"""

import json
import random
from collections.abc import Iterator
from typing import NamedTuple

from tale_jax.data.tales import grammar

NUM_QUESTIONS = 3  # of a conversation
ASKS = "{tale}\n\n{question}"  # the first message; the others are questions alone


class Question(NamedTuple):
    """A question about a tale, and the only right answer."""

    text: str
    answer: str


def ask(tale: str) -> list[Question]:
    """All questions about a tale of the grammar, always in the same order. Raises ValueError for another text."""
    story = grammar.retold(tale)
    return [Question(text, _answer(who)) for text, who in dict(_asked(story, tale)).items()]


def _asked(story: grammar.Story, tale: str) -> Iterator[tuple[str, str]]:
    cast, hero = story.cast, story["hero"]
    yield "Who is this tale about?", hero
    for thing, owner in story.owners.items():
        yield f"Who had the {thing} at first?", story.first_owners[thing]
        yield f"Who had the {thing} in the end?", owner
    for listener, teller in story.tellers.items():
        yield f"Who told {_named(listener)} the secret?", teller
    if story.tellers:
        yield "Who was the secret about?", story["subject"]
    if "animal" in cast:
        yield f"Who helped {hero} on the way?", story["animal"]
        yield f"Who did {hero} stop to help?", story["animal"]
    if "rival" in cast:
        yield f"Who raced against {hero}?", story["rival"]
    if f"the {cast.get('thief')} " in tale:  # not every sentence names it
        yield f"What took the {story['thing']}?", story["thief"]
    if "victim" in cast:
        yield "Who was in trouble?", story["victim"]


def _named(who: str) -> str:
    return who if who[:1].isupper() else f"the {who}"


def _answer(who: str) -> str:
    name = _named(who)
    return f"{name[:1].upper()}{name[1:]}."


def conversation_about(index: int, split: str, seed: int) -> str:
    """A tale and `NUM_QUESTIONS` questions about it, as a document that is a conversation (`chat.py`)."""
    tale = grammar.tell(index, split, seed).text
    questions = ask(tale)
    random.Random(f"{seed}/{split}/{index}/questions").shuffle(questions)
    messages = []
    for number, question in enumerate(questions[:NUM_QUESTIONS]):
        asked = ASKS.format(tale=tale, question=question.text) if number == 0 else question.text
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": question.answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False, separators=(",", ":"))
