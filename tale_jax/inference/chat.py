"""Samples on a terminal: streamed as they are written, as one JSON object, or in a conversation of prompts."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

from tale_jax.inference.sampler import Generation


def print_samples(generation: Generation, as_json: bool = False, **facts: Any) -> None:
    """Prints samples as they are written, or one JSON object on one line when all are there, with `facts` in it."""
    if as_json:
        samples = [dataclasses.asdict(piece.sample) for piece in generation if piece.sample]
        result = {"prompt": generation.prompt, "samples": samples, "seed": generation.seed}
        result |= {"prompt_tokens": len(generation.ids), "seconds": generation.seconds}
        print(json.dumps(result | {"tokens_per_second": generation.tokens_per_second} | facts), flush=True)
        return
    between = True
    for number, text, sample in generation:
        title = f"[{number + 1}/{generation.num_samples}] " if generation.num_samples > 1 else ""
        print(f"{title}{generation.prompt}" * between + text, end="\n" * (sample is not None), flush=True)
        between = sample is not None
    if sys.stdout.isatty():
        tokens = sum(sample.tokens for sample in generation.samples)
        print(f"({tokens} tokens, {generation.tokens_per_second:.0f} a second)", file=sys.stderr)


def converse(stream: Callable[[str], Generation], write: Callable[[Generation], None]) -> None:
    """Asks for prompts until an empty line or the end of stdin; Ctrl-C stops the text that is being written."""
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
            write(stream(prompt))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(" [stopped]")
