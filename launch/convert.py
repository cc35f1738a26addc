"""Writes a trained model in the format of another program, or makes a workdir of a model from elsewhere.

    python launch/convert.py --workdir=experiments/tales --to=huggingface --out=my-model
    python launch/convert.py --workdir=experiments/tales --to=gguf --dtype=q8_0 --out=tales.gguf
    python launch/convert.py --from=huggingface --path=SmolLM2-135M --workdir=experiments/smollm2

A workdir made from elsewhere is like any other: evaluate, sample and fine-tune it.
"""

from pathlib import Path

from cli import run
from absl import flags

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "folder of the experiment: with --to it is read, with --from made", required=True)
flags.DEFINE_enum("to", None, ["huggingface", "gguf", "ollama"], "format to write")
flags.DEFINE_string("out", None, "what to write: a folder, or with --to=gguf a file; it must not exist yet")
flags.DEFINE_enum("dtype", "float32", ["float32", "float16", "bfloat16", "q8_0"], "of the weights; q8_0 is for gguf")
flags.DEFINE_integer("step", 0, "checkpoint; 0: the best by validation loss", lower_bound=0)
flags.DEFINE_string("weights", "auto", "last, ema, auto (ema where there is one), or mean:K of K checkpoints")
flags.DEFINE_enum("from", None, ["huggingface"], "format to read")
flags.DEFINE_string("path", None, "folder to read")


def main(_: list[str]) -> None:
    source, to = FLAGS["from"].value, FLAGS.to
    if bool(source) == bool(to):
        raise ValueError("give one of --to=FORMAT (with --out=PATH) and --from=FORMAT (with --path=FOLDER)")
    if not (FLAGS.out if to else FLAGS.path):
        raise ValueError(f"{'--out' if to else '--path'} is missing; give {'--out=PATH' if to else '--path=FOLDER'}")

    from tale_jax.convert.formats import export_model, import_model
    from tale_jax.hardware.backend import start_backend
    from tale_jax.runs.experiment import open_experiment

    backend = start_backend("cpu")
    if to:
        experiment = open_experiment(FLAGS.workdir, backend, FLAGS.step, weights=FLAGS.weights)
        export_model(experiment, to, Path(FLAGS.out), FLAGS.dtype)
    else:
        import_model(source, Path(FLAGS.path), Path(FLAGS.workdir))
    print(f"written to {FLAGS.out if to else FLAGS.workdir}")


if __name__ == "__main__":
    run(main)
