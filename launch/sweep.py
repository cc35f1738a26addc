"""Trains each combination of some settings' values, and compares what the runs reached.

python launch/sweep.py --config=configs/tales.py --sweep=optimizer.learning_rate=1e-3,2e-3 --sweep=seed=0,1 --out=sweep
python launch/sweep.py --config=configs/tales.py --sweep=model.num_layers=2,4,6 --out=depth --engine=slurm --cpus=8

The same command goes on with a sweep that was interrupted. Exit code 1: some run failed; the table says why.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import config_words, define_path, overrides, run
from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, as configs/tales.py")
SWEEP = flags.DEFINE_multi_string("sweep", None, "NAME=VALUE,VALUE of a setting; several are combined", required=True)
OUT = define_path("out", "folder to write", "folder of the sweep; it is made when missing", required=True)
ENGINE = flags.DEFINE_enum("engine", "local", ["local", "slurm", "ray"], "who runs them")
JOBS = flags.DEFINE_integer("jobs", 1, "runs at a time, on this machine")
CPUS = flags.DEFINE_integer("cpus", 0, "cores of each run; 0: those of this machine, shared by the jobs")
GPUS = flags.DEFINE_integer("gpus", 0, "GPUs of each run")
MEMORY = flags.DEFINE_string("memory", "", "of each run, as 4GB")
JSON = flags.DEFINE_bool("json", False, "print one JSON object as the last line")
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    from tale_jax.runs.engines import Resources, make_engine
    from tale_jax.runs.sweep import print_sweep, read_axes, run_sweep

    axes = read_axes(SWEEP.value)
    engine = make_engine(ENGINE.value, Resources(JOBS.value, CPUS.value, GPUS.value, MEMORY.value))
    command = [sys.executable, str(Path(__file__).with_name("train.py")), *config_words("config")]
    results, number = run_sweep(CONFIG.value.to_dict(), command, axes, OUT.value, engine, overrides("config"))
    print_sweep(results, OUT.value, JSON.value)
    sys.exit(128 + number if number else any(result["state"] != "finished" for result in results.values()))


if __name__ == "__main__":
    run(main)
