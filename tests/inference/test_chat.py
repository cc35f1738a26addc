"""What a user sees on the terminal, and what is said back."""

import functools
import io
import json
import sys

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
    assert result["tokens_per_second"] > 0 and result["step"] == 3 and result["prompt"] == PROMPT


def test_the_loop_outlives_a_bad_prompt(sampler, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The cat\n   \nThe dog\n\nnot read\n"))
    stream = functools.partial(sampler.stream, settings=SampleSettings(max_tokens=5))
    prompt_loop(stream, print_samples)
    out, err = capsys.readouterr()
    assert out.startswith("The cat") and "\nThe dog" in out and "not read" not in out
    assert err == "error: prompt='   ' must hold more than whitespace; leave it out to start a document\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("The cat"))
    prompt_loop(stream, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert capsys.readouterr().out == " [stopped]\n"
