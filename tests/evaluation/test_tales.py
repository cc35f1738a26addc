"""Sampled tales are judged by the grammar and searched for in the training text."""

import re

import numpy as np
import pytest

from tale_jax.data.tales import grammar
from tale_jax.data.token_files import document_starts, iter_documents, load_tokens
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.evaluation.tales import grammar_nats, judge_samples
from tale_jax.inference.sampler import Sample, Sampler, TextDelta


class Scripted(Sampler):
    """In place of a sampler: writes given texts, and checks how it is asked to."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.context = tokenizer, texts, 208

    def stream(self, prompt, settings, *, num_samples=1, seed=0, params=None):
        assert (prompt, num_samples, seed) == ("", len(self.texts), 3)
        assert (settings.max_tokens, settings.temperature) == (207, 0.7)
        for number, text in enumerate(self.texts):
            yield TextDelta(number, "", None)
            yield TextDelta(number, text, Sample(text, len(text), 0.0, "eos"))


@pytest.fixture(scope="module")
def tokenizer(trained):
    return Tokenizer.load(trained / "tokenizer" / "tokenizer.model")


def test_shares_of_tales(trained, tokenizer):
    train = list(iter_documents(load_tokens(trained, "train")[0], tokenizer))
    new = [grammar.tell(i, "test", 77).text for i in range(3)]
    untrue = renamed(new[0])
    assert grammar.judge(untrue).kind == "world"
    texts = [*new, train[0], untrue, "Once there was nothing."]
    assert not set(new) & set(train)
    done = []
    result = judge_samples(Scripted(tokenizer, texts), trained, len(texts), 0.7, 3, done.append)
    assert result == {
        "sample_temperature": 0.7,
        "num_samples": 6,
        "accepted_share": 4 / 6,
        "consistent_share": 4 / 5,
        "copied_share": 1 / 6,
    }
    assert sum(done) == 6


def renamed(text):
    """The tale with another name where its hero is named last, so that someone else ends it."""
    name = max(re.findall(r"[a-z] ([A-Z][a-z]+)\b", text), key=text.count)
    start, _, end = text.rpartition(name)
    return f"{start}{'Ines' if name != 'Ines' else 'Felix'}{end}"


def test_nats_of_the_grammar_are_those_it_told_with(trained, tokenizer):
    tokens, _ = load_tokens(trained, "valid")
    starts = document_starts(tokens, tokenizer.bos_id)
    last = len(starts) - 1
    found = grammar_nats(np.asarray(tokens), starts, {0, 5, last}, tokenizer)
    assert found == pytest.approx({i: -grammar.tell(i, "valid", 0).logprob for i in (0, 5, last)})
