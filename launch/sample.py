"""Generates text with a trained model: streams it to the terminal, or prints one JSON object.

    python launch/sample.py --workdir=experiments/tales
    python launch/sample.py --workdir=experiments/tales --prompt="Once upon a time" --temperature=0.7 --num_samples=3
    python launch/sample.py --workdir=experiments/tales --interactive
    python launch/sample.py --workdir=experiments/chat --chat

With --chat a line is answered, by the chat template of the workdir, and what was said before is read again.

An interactive session takes a prompt a line, and commands: /help lists them. Ctrl-C stops the text that is being
written; a second one, or Ctrl-D, ends the session. Each turn has a new seed.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import define_path, run
from absl import flags

FLAGS = flags.FLAGS
define_path("workdir", "folder", "folder of the experiment", required=True)
flags.DEFINE_string("prompt", "", "text to continue; empty: the start of a document")
flags.DEFINE_integer("max_tokens", 256, "new tokens of a sample, at most")
flags.DEFINE_float("temperature", 0.8, "logits are divided by it; 0: greedy, 1: as trained")
flags.DEFINE_integer("top_k", 0, "sample only among the k most likely tokens; 0: all")
flags.DEFINE_float("top_p", 1.0, "sample only among the most likely tokens with this probability together; 1: all")
flags.DEFINE_float("min_p", 0.0, "sample only among tokens at least this share as likely as the most likely; 0: all")
flags.DEFINE_float("repetition_penalty", 1.0, "above 1 makes tokens seen before less likely; 1: off")
flags.DEFINE_integer("num_samples", 1, "samples, decoded together")
flags.DEFINE_integer("seed", 0, "random seed of the samples; --interactive adds 1 for each turn")
flags.DEFINE_multi_string("stop", [], "text that ends a sample, which is cut before it; may be repeated")
flags.DEFINE_enum("long_prompt", "refuse", ["refuse", "window"], "a prompt over the context: refused, or its end used")
flags.DEFINE_integer("step", 0, "step of the checkpoint; 0: the best by validation loss", lower_bound=0)
flags.DEFINE_string("weights", "auto", "last, ema, auto (ema where there is one), or mean:K of K checkpoints")
flags.DEFINE_enum("precision", "float32", ["auto", "float32", "bfloat16", "float16"], "dtype to compute in")
flags.DEFINE_bool("interactive", False, "ask for prompts, one after another; /help lists commands")
flags.DEFINE_bool("chat", False, "hold a conversation, where the workdir has a chat template")
flags.DEFINE_string("system", "", "of --chat: what the model reads before the first message")
flags.DEFINE_bool("json", False, "print one JSON object as the last line")


def main(_: list[str]) -> None:
    from tale_jax.inference.sampler import SampleSettings
    from tale_jax.runs.sample import sample

    settings = SampleSettings(**{field.name: FLAGS[field.name].value for field in dataclasses.fields(SampleSettings)})
    options = ("prompt", "num_samples", "seed", "step", "weights", "precision", "interactive", "chat", "system")
    sample(FLAGS.workdir, settings, as_json=FLAGS.json, **{name: FLAGS[name].value for name in options})


if __name__ == "__main__":
    run(main)
