"""Writes a trained model in the format of another program, or makes a workdir of a model from elsewhere.

    python launch/convert.py --workdir=experiments/tales --to=huggingface --out=my-model
    python launch/convert.py --workdir=experiments/tales --to=gguf --dtype=q8_0 --out=tales.gguf
    python launch/convert.py --workdir=experiments/lora --to=peft --out=adapter
    python launch/convert.py --from=huggingface --path=SmolLM2-135M --workdir=experiments/smollm2

A workdir made from elsewhere is like any other: evaluate, sample, serve and fine-tune it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import define_path, run
from absl import flags

FLAGS = flags.FLAGS
define_path("workdir", "path", "folder of the experiment: with --to it is read, with --from made", required=True)
flags.DEFINE_enum("to", None, ["huggingface", "peft", "gguf", "ollama"], "format to write")
OUT = define_path("out", "path", "what to write: a folder, or with --to=gguf a file; it must not exist yet")
flags.DEFINE_enum("dtype", "float32", ["float32", "float16", "bfloat16", "q8_0"], "of the weights; q8_0 is for gguf")
flags.DEFINE_integer("step", 0, "checkpoint; 0: the best by validation loss", lower_bound=0)
flags.DEFINE_string("weights", "auto", "last, ema, auto (ema where there is one), or mean:K of K checkpoints")
flags.DEFINE_enum("from", None, ["huggingface"], "format to read")
PATH = define_path("path", "folder", "folder to read")


def main(_: list[str]) -> None:
    from tale_jax.convert.formats import convert
    from tale_jax.utils.streams import say

    made = convert(
        FLAGS.workdir,
        to=FLAGS.to or "",
        out=OUT.value,
        dtype=FLAGS.dtype,
        step=FLAGS.step,
        weights=FLAGS.weights,
        source=FLAGS["from"].value or "",
        path=PATH.value,
    )
    say(f"written to {made}")


if __name__ == "__main__":
    run(main)
