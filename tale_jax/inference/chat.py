"""Samples on a terminal: streamed while they are decoded, as one JSON object, or for one prompt after another."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

from tale_jax.inference.sampler import Generation


def print_samples(generation: Generation, as_json: bool = False, **facts: Any) -> None:
    """Prints samples while they are decoded, or, at the end, one JSON object on one line with `facts` in it."""
    if as_json:
        samples = [dataclasses.asdict(delta.sample) for delta in generation if delta.sample]
        result = {"prompt": generation.prompt, "samples": samples, "seed": generation.seed}
        result |= {"prompt_tokens": len(generation.ids), "seconds": generation.seconds}
        print(json.dumps(result | {"tokens_per_second": generation.tokens_per_second} | facts), flush=True)
        return
    starts_sample = True
    for number, text, sample in generation:
        title = f"[{number + 1}/{generation.num_samples}] " if generation.num_samples > 1 else ""
        print(f"{title}{generation.prompt}" * starts_sample + text, end="\n" * (sample is not None), flush=True)
        starts_sample = sample is not None
    if sys.stdout.isatty():
        tokens = sum(sample.tokens for sample in generation.samples)
        print(f"({tokens} tokens, {generation.tokens_per_second:.0f} tokens/s)", file=sys.stderr)


def prompt_loop(stream: Callable[[str], Generation], show: Callable[[Generation], None]) -> None:
    """Reads prompts from stdin and shows what follows each, until an empty line or the end of stdin.

    Ctrl-C stops the sample under way; a prompt that cannot be used gets one line on stderr, and the loop continues.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited and recalled)
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not prompt:
            return
        try:
            show(stream(prompt))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(" [stopped]")
