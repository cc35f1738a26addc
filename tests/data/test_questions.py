"""Questions about tales: the answers are in the tale, agree with its words, and every plot has some."""

import json
import re

import pytest

from tale_jax.data.tales import grammar
from tale_jax.data.tales.questions import NUM_QUESTIONS, ask, conversation_about

TALES = [grammar.tell(index, "valid", 3).text for index in range(120)]


def test_every_answer_is_somebody_of_the_tale():
    for tale in TALES:
        for question in ask(tale):
            who = question.answer.rstrip(".").removeprefix("The ")
            assert who in tale, (tale, question)
            assert question.answer[0].isupper() and question.text.endswith("?")


def test_questions_of_all_kinds_are_asked_and_have_different_answers():
    kinds = {}
    for tale in TALES:
        questions = ask(tale)
        assert len(questions) >= 2 and len({q.text for q in questions}) == len(questions)
        for question in questions:
            names = r"[A-Z][a-z]+(?= (the|on|stop))|(?<=against )\w+|the [\w ]+?(?=\?| at| in| the)"
            kind = re.sub(names, "_", question.text)
            kinds.setdefault(kind, set()).add(question.answer)
    assert len(kinds) >= 9 and all(len(answers) > 1 for answers in kinds.values()), kinds


def test_answers_follow_the_words_of_the_tale():
    """What a sentence of one plot says, read by an expression and not by the grammar."""
    swaps = owners = 0
    for tale in TALES:
        answers = dict(ask(tale))
        if found := re.search(r'"Bring it back by (\w+)," said the ([a-z ]+)\.', tale):
            owners += 1
            assert [a for q, a in answers.items() if q.endswith("at first?")] == [f"The {found[2]}."]
        if found := re.search(r"(?:wish|wanted in the world was) an? ([a-z ]+)\.", tale):
            swaps += 1
            assert answers[f"Who had the {found[1]} in the end?"] != answers[f"Who had the {found[1]} at first?"]
    assert swaps and owners


def test_a_conversation_is_about_a_tale_of_the_split_and_is_always_the_same():
    document = conversation_about(7, "test", 1)
    messages = json.loads(document)["messages"]
    tale, _, first = messages[0]["content"].partition("\n\n")
    assert grammar.split_of(tale) == "test" and grammar.judge(tale).accepted
    asked = [first, *(message["content"] for message in messages[2::2])]
    answers = [message["content"] for message in messages[1::2]]
    assert 2 <= len(asked) <= NUM_QUESTIONS and set(zip(asked, answers, strict=True)) <= set(ask(tale))
    assert conversation_about(7, "test", 1) == document != conversation_about(8, "test", 1)


def test_what_is_no_tale_has_no_questions():
    with pytest.raises(ValueError, match="'Once' must be a tale of the grammar"):
        ask("Once")
