"""What a user sees on the terminal, and what is said back."""

import functools
import io
import json
import re
import sys

import pytest

from tale_jax.inference.chat import print_samples, prompt_loop
from tale_jax.inference.sampler import SampleSettings

PROMPT = "The cat sat"


def test_samples_are_printed_as_texts_or_as_one_json_object(sampler, capsys):
    settings = SampleSettings(max_tokens=20)
    print_samples(sampler.stream(PROMPT, settings, num_samples=2, seed=5))
    shown = capsys.readouterr().out
    print_samples(sampler.stream(PROMPT, settings, num_samples=2, seed=5), as_json=True, step=3)
    result = json.loads(capsys.readouterr().out)
    assert shown == "".join(f"[{i + 1}/2] {PROMPT}{sample['text']}\n" for i, sample in enumerate(result["samples"]))
    assert set(result["samples"][0]) == {"text", "tokens", "logprob", "finish_reason"}
    assert result["step"] == 3 and result["prompt"] == PROMPT


def test_a_rate_is_the_tokens_over_the_seconds_beside_it(sampler, capsys):
    """Also where a part of the seconds went into compiling; of decoding alone there is a rate of its own."""
    for max_tokens in (6, 40, 40):  # of the last nothing is compiled any more
        print_samples(sampler.stream("The", SampleSettings(max_tokens=max_tokens), num_samples=3), as_json=True)
        result = json.loads(capsys.readouterr().out)
        assert result["tokens"] == sum(sample["tokens"] for sample in result["samples"])
        assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["seconds"])
    decoding = result["decoding"]
    assert decoding["tokens"] == result["tokens"] and decoding["seconds"] <= result["seconds"]
    assert decoding["tokens_per_second"] == pytest.approx(decoding["tokens"] / decoding["seconds"])


def session(sampler, monkeypatch, capsys, *lines: str, show=print_samples, **options) -> tuple[str, str]:
    """Stdout and stderr of a session in which these lines are piped to stdin."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    prompt_loop(sampler.stream, show, SampleSettings(max_tokens=5), **options)
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_every_turn_has_a_new_seed_and_can_be_repeated(sampler, monkeypatch, capsys):
    show = functools.partial(print_samples, as_json=True)
    out, err = session(
        sampler, monkeypatch, capsys, PROMPT, PROMPT, "/seed 7", PROMPT, "/seed 8", PROMPT, show=show, seed=7
    )
    turns = [json.loads(line) for line in out.splitlines()]
    assert [turn["seed"] for turn in turns] == [7, 8, 7, 8]
    texts = [turn["samples"] for turn in turns]
    assert texts[0] == texts[2] and texts[1] == texts[3] and texts[0] != texts[1]
    assert re.findall(r"\(seed (\d+)\)", err) == ["7", "8", "7", "8"]


def test_commands_change_the_settings(sampler, monkeypatch, capsys):
    show = functools.partial(print_samples, as_json=True)
    lines = ["/max_tokens 2", PROMPT, "/temperature 0", "/max_tokens 9", PROMPT, PROMPT, "/top_k", "/new"]
    out, err = session(sampler, monkeypatch, capsys, *lines, show=show)
    turns = [json.loads(line) for line in out.splitlines()]
    assert turns[0]["tokens"] <= 2 and turns[1]["tokens"] > 2
    assert turns[1]["samples"] == turns[2]["samples"]  # greedy, whatever the seed
    assert turns[3]["prompt"] == "" and "(top_k 0)" in err


def test_help_names_every_setting_and_its_value(sampler, monkeypatch, capsys):
    out, _ = session(sampler, monkeypatch, capsys, "/temperature 0.3", "/help")
    for words in ("/seed N", "/quit", "/temperature VALUE", "now 0.3", "/top_p VALUE", "/max_tokens VALUE", "Ctrl-C"):
        assert words in out, words
    assert all(len(line) <= 70 for line in out.splitlines())


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/temperature -1", "temperature=-1.0 must be finite and at least 0; try /temperature 0.7"),
        ("/temperature warm", "temperature=warm must be a number; it stays 1.0, try /temperature 1.0"),
        ("/temperature nan", "temperature=nan must be finite and at least 0; try /temperature 0.7"),
        ("/top_k 1.5", "top_k=1.5 must be a whole number; it stays 0, try /top_k 0"),
        ("/top_p 2", "top_p=2.0 must be above 0 and at most 1; try /top_p 0.95"),
        ("/seed -3", "seed=-3 must be a whole number below 2^32; try /seed 0"),
        ("/seed 4294967296", "seed=4294967296 must be a whole number below 2^32; try /seed 0"),
        ("/sed 3", "/sed is not a command; try /help, or //sed for a text that begins with /sed"),
        ("/long_prompt cut", "long_prompt=cut must be one of refuse, window; try /long_prompt window"),
        ("the cat " * 40, "keep only its last tokens: /long_prompt window"),
        ("a \udcff b", "the line must be text in the encoding of the terminal (UTF-8); type it again"),
    ],
)
def test_a_bad_line_is_one_line_and_the_session_goes_on(sampler, monkeypatch, capsys, line, error):
    out, err = session(sampler, monkeypatch, capsys, line, PROMPT)
    assert out.startswith(PROMPT)
    assert error in err and err.startswith("error: ") and len(err.splitlines()) == 2  # and the seed of the turn


def test_the_remedy_of_a_long_prompt_works(sampler, monkeypatch, capsys):
    out, err = session(sampler, monkeypatch, capsys, "/long_prompt window", "the cat " * 40)
    assert out.startswith("the cat the cat") and "error" not in err


def test_a_session_ends_where_it_is_told_to_and_empty_lines_are_nothing(sampler, monkeypatch, capsys):
    out, _ = session(sampler, monkeypatch, capsys, "", "   ", "//x", "/quit", "not read")
    assert out.startswith("/x") and "not read" not in out and out.count("\n") == 1


def test_a_first_prompt_is_answered_before_any_is_read(sampler, monkeypatch, capsys):
    out, err = session(sampler, monkeypatch, capsys, "The dog", first_prompt=PROMPT)
    assert out.startswith(PROMPT) and "\nThe dog" in out and err == "(seed 0)\n(seed 1)\n"


def test_an_interrupt_of_a_pipeline_ends_it(sampler, monkeypatch):
    """Nobody sits at stdin, so there is no next prompt to go back to."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n"))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prompt_loop(sampler.stream, interrupted, SampleSettings())
