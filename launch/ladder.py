"""Trains a few small models on a text, and says what a long run would reach, with which size and how many tokens.

python launch/ladder.py --config=configs/files.py --config.corpus.path=my-texts/ --out=experiments/ladder --minutes=480
python launch/ladder.py --config=configs/tales.py --out=experiments/ladder --minutes=60 --check

The same command goes on with a ladder that was interrupted. `train.py --config.minutes=…` takes what was found out.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import define_path, overrides, run
from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, as configs/files.py")
OUT = define_path("out", "folder to write", "folder of the ladder; it is made when missing", required=True)
MINUTES = flags.DEFINE_float("minutes", 480.0, "of the run that is asked about")
SHARE = flags.DEFINE_float("share", 0.15, "of these minutes, that the small runs may take")
CHECK = flags.DEFINE_bool("check", False, "also train the run that is asked about, and compare")
ENGINE = flags.DEFINE_enum("engine", "local", ["local", "ray", "slurm"], "what starts the small runs, one by one")
JSON = flags.DEFINE_bool("json", False, "print one JSON object as the last line")
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    from tale_jax.config import Config
    from tale_jax.hardware.backend import start_backend
    from tale_jax.runs.engines.jobs import Resources, make_engine
    from tale_jax.runs.ladder import print_ladder, run_ladder

    given = overrides("config")
    config = Config.build(CONFIG.value, given)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the rungs, which are processes, need the GPU
    backend = start_backend(config.backend.platform)
    # One at a time: at once they would slow each other, and their speed is a part of the result.
    engine = make_engine(ENGINE.value, Resources(gpus=int(backend.platform == "cuda")), 1)
    ladder = run_ladder(config, OUT.value, backend, MINUTES.value, SHARE.value, CHECK.value, given, engine)
    if isinstance(ladder, int):
        sys.exit(128 + ladder)
    print_ladder(ladder, OUT.value, JSON.value)


if __name__ == "__main__":
    run(main)
