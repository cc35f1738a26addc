"""Trains every combination of some settings, and tells in one table which is best.

python launch/sweep.py --config=configs/tales.py --sweep=optimizer.learning_rate=1e-3,2e-3 --sweep=seed=0,1 --out=sweep

Each run has a workdir in the folder. The same command goes on with a sweep that was interrupted, and more values of the
same settings add to it. Exit code 1: a run has failed, and the others have not waited for it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import define_path, overrides, run
from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, as configs/tales.py")
SWEEP = flags.DEFINE_multi_string("sweep", [], "what varies, as optimizer.learning_rate=1e-3,2e-3; may be given often")
OUT = define_path("out", "folder to write", "folder of the sweep; it is made when missing", required=True)
ENGINE = flags.DEFINE_enum("engine", "local", ["local", "ray", "slurm"], "what starts the runs")
JOBS = flags.DEFINE_integer(
    "jobs", None, "runs at once at most; 0: as many as fit; left out: 1, and as many as fit on a cluster"
)
CPUS = flags.DEFINE_float("cpus", 0, "cores of each run; 0: not stated")
GPUS = flags.DEFINE_integer("gpus", 0, "GPUs of each run; 0: not stated")
MEMORY = flags.DEFINE_string("memory", "", "memory of each run, as 8GB; left out: not stated")
STOP_EARLY = flags.DEFINE_bool("stop_early", False, "stop runs that are worse than others (ASHA, by Ray)")
JSON = flags.DEFINE_bool("json", False, "print one JSON object as the last line")
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    from tale_jax.runs.engines.jobs import Resources, make_engine
    from tale_jax.runs.sweep import print_sweep, run_sweep
    from tale_jax.utils.format import parse_bytes

    resources = Resources(CPUS.value, GPUS.value, parse_bytes(MEMORY.value))
    engine = make_engine(ENGINE.value, resources, JOBS.value, STOP_EARLY.value)
    sweep = run_sweep(CONFIG.value.to_dict(), SWEEP.value, OUT.value, engine, overrides("config"), STOP_EARLY.value)
    print_sweep(sweep, OUT.value, JSON.value)
    sys.exit(128 + sweep.signal if sweep.signal else int(sweep.failed > 0))


if __name__ == "__main__":
    run(main)
