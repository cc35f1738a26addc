"""Evaluates a trained model on a whole split: loss per token, word and byte, for tales also above their entropy.

python launch/evaluate.py --workdir=experiments/tales --split=test
python launch/evaluate.py --workdir=experiments/wikitext2 --stride=64 --json
python launch/evaluate.py --workdir=experiments/wikitext2 --quality
python launch/evaluate.py --workdir=experiments/wikitext2 --tasks=lambada_openai --json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import define_path, run
from absl import flags

WORKDIR = define_path("workdir", "folder", "folder of the experiment", required=True)
SPLIT = flags.DEFINE_enum("split", "valid", ["train", "valid", "test"], "split to score")
STEP = flags.DEFINE_integer("step", 0, "step of the checkpoint; 0: the best by validation loss", lower_bound=0)
WEIGHTS = flags.DEFINE_string("weights", "auto", "last, ema, auto (ema where there is one), or mean:K of K checkpoints")
STRIDE = flags.DEFINE_integer("stride", 0, "tokens between windows; 0: the context; less: they slide", lower_bound=0)
PRECISION = flags.DEFINE_enum("precision", "float32", ["auto", "float32", "bfloat16", "float16"], "dtype to compute in")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 100, "tales to sample and judge; 0: none", lower_bound=0)
TEMPERATURE = flags.DEFINE_float("sample_temperature", 0.7, "temperature of these tales", lower_bound=0.0)
QUALITY = flags.DEFINE_bool("quality", False, "measure samples beside held-out text; quality.jsonl keeps them")
TASKS = flags.DEFINE_string("tasks", "", "tasks of lm-eval by name, or folders of them in YAML, with commas between")
FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "examples before each question; left out: as the task says")
LIMIT = flags.DEFINE_integer("limit", 0, "documents of each task; 0: all", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "random seed of all samples", lower_bound=0)
JSON = flags.DEFINE_bool("json", False, "print one JSON object as the last line")


def main(_: list[str]) -> None:
    from tale_jax.hardware.backend import start_backend
    from tale_jax.planning.numerics import choose_precision
    from tale_jax.runs.evaluate import describe, describe_tasks, evaluate, evaluate_tasks, keep
    from tale_jax.runs.experiment import open_experiment
    from tale_jax.utils.files import json_line
    from tale_jax.utils.streams import say

    backend = start_backend("auto")
    dtype = choose_precision(backend, PRECISION.value)[0]
    experiment = open_experiment(WORKDIR.value, backend, STEP.value, dtype, WEIGHTS.value)
    if TASKS.value:
        result = evaluate_tasks(experiment, TASKS.value, FEWSHOT.value, LIMIT.value)
        keep(WORKDIR.value, result)
        return print(json_line(result)) if JSON.value else say(describe_tasks(result))
    options = {flag.name: flag.value for flag in (SPLIT, STRIDE, NUM_SAMPLES, TEMPERATURE, SEED)}
    result = evaluate(experiment, with_quality=QUALITY.value, **options)
    is_kept = keep(WORKDIR.value, result)
    if JSON.value:
        return print(json_line(result))
    say(describe(result))
    if is_kept:
        say(f"The result is kept in {WORKDIR.value}/evaluations.jsonl")


if __name__ == "__main__":
    run(main)
