"""A conversation reads what was said before, forgets what does not fit, and says so."""

import io
import json
import sys

import pytest
from helpers import Terminal

from tale_jax.data.chat_template import DEFAULT_TEMPLATE, TEMPLATE_FILE, ChatTemplate
from tale_jax.inference.chat import prompt_loop
from tale_jax.inference.conversation import Conversation, open_conversation
from tale_jax.inference.sampler import Sampler, SampleSettings


@pytest.fixture(scope="module")
def sampler(make_model, tokenizer):
    return Sampler(*make_model(seq_len=128), tokenizer)


@pytest.fixture
def talk(sampler, tokenizer):
    return Conversation(sampler, ChatTemplate(tokenizer, DEFAULT_TEMPLATE))


def say(talk, *lines, max_tokens=4):
    """The token ids that the model read for each line, and what it answered."""
    read, answers = [], []
    for line in lines:
        generation = talk.stream(line, SampleSettings(max_tokens=max_tokens), seed=1)
        talk.show(generation)
        read.append(generation.ids)
        answers.append(talk._turns[-1]["content"])
    return read, answers


def test_each_turn_reads_what_was_said(talk, tokenizer, capsys):
    read, answers = say(talk, "a", "b")
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)
    said = [("user", "a"), ("assistant", answers[0]), ("user", "b")]
    wanted = ChatTemplate(tokenizer, DEFAULT_TEMPLATE).prompt([{"role": r, "content": c} for r, c in said])
    assert read[1] == wanted and wanted.count(tokenizer.bos_id) == 4
    talk.clear()
    assert say(talk, "a") == ([read[0]], [answers[0]])


def test_the_oldest_turns_leave_when_the_context_is_full(sampler, tokenizer, capsys):
    talk = Conversation(sampler, ChatTemplate(tokenizer, DEFAULT_TEMPLATE), system="c")
    read, _ = say(talk, *"abcdefg")
    assert max(map(len, read)) <= sampler.context - 4
    assert all(tokenizer.decode(ids).startswith("system\nc\nuser\n") for ids in read)
    assert "earlier messages no longer fit the context, and are not read" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"the message must fit the context of 128 tokens, but is \d+ .*; shorten it"):
        talk.stream("the cat sat " * 90, SampleSettings())
    say(talk, "a")


def test_a_session_of_a_conversation(talk, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n/new\n/help\na\n/quit\n"))
    prompt_loop(
        talk.stream, lambda *a, **k: talk.show(*a, **k, as_json=True), SampleSettings(max_tokens=3), on_new=talk.clear
    )
    out, err = capsys.readouterr()
    first, *help_lines, second = out.splitlines()
    assert (
        json.loads(first)["prompt"] == "a" and json.loads(first)["prompt_tokens"] == json.loads(second)["prompt_tokens"]
    )
    assert "(a new conversation)" in err and any("forgets what was said" in line for line in help_lines)


def test_a_conversation_needs_a_template_and_one_sample(sampler, tmp_path):
    with pytest.raises(
        ValueError, match=r"--chat needs a chat template, and workdir=.* has none; fine-tune it on conv"
    ):
        open_conversation(sampler, tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / TEMPLATE_FILE).write_text(DEFAULT_TEMPLATE)
    assert open_conversation(sampler, tmp_path)
    with pytest.raises(ValueError, match="num_samples=2 must be 1 with --chat; leave it out"):
        open_conversation(sampler, tmp_path, num_samples=2)


@pytest.mark.slow
def test_a_conversation_in_a_terminal(trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "chat")
    (tmp_path / "chat" / "tokenizer" / TEMPLATE_FILE).write_text(DEFAULT_TEMPLATE)
    with Terminal("sample", f"--workdir={tmp_path / 'chat'}", "--chat", "--max_tokens=5", "--seed=3") as terminal:
        terminal.wait_for("a line is what you say")
        terminal.type("Who had the coin?\n")
        terminal.wait_for("seed 3; .* tokens")
        terminal.type("/new\n")
        terminal.wait_for("a new conversation")
        terminal.type("/quit\n")
        assert terminal.wait() == 0
