"""Trains a model, or goes on with the run of a workdir.

python launch/train.py --config=configs/tales.py --workdir=experiments/tales
python launch/train.py --config=configs/files.py --config.corpus.path=my-texts/ --workdir=experiments/mine
python launch/train.py --workdir=experiments/mine
python launch/train.py --workdir=experiments/mine --config.total_steps=4000

Without --config the run in the workdir goes on with its own settings; those given beside it change or check them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import START_TIME, define_path, overrides, run, use_saved_config
from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, as configs/tales.py; left out: that of the workdir")
WORKDIR = define_path(
    "workdir", "folder to write", "folder of the experiment; it is made when missing, else resumed", required=True
)
ADDRESS = flags.DEFINE_string("coordinator_address", "", "HOST:PORT of process 0, where several processes train")
COUNT = flags.DEFINE_integer("num_processes", 0, "how many they are; 0: as the launcher says", lower_bound=0)
SCORE = define_path("score", "file to write", "then scores all of the valid split, and writes the result here, as JSON")
INDEX = flags.DEFINE_integer("process_id", -1, "which of them this is, from 0; -1: as the launcher says")


def main(_: list[str]) -> None:
    from tale_jax.config import Config

    workdir = WORKDIR.value
    if CONFIG.value is None:
        raise ValueError(
            f"workdir={workdir} holds no run to go on with (no config.json there); give a recipe for a new one: "
            "--config=configs/NAME.py, or --config=configs/files.py --config.corpus.path=TEXTS for your own text"
        )
    given = overrides("config")
    config = Config.build(CONFIG.value, given)
    from tale_jax.convert.formats import import_base, with_base
    from tale_jax.hardware.backend import start_backend  # JAX is imported when the config is known to be right
    from tale_jax.hardware.distributed import from_main_process
    from tale_jax.hardware.joining import find_place, joined
    from tale_jax.runs.evaluate import score_valid
    from tale_jax.runs.train import describe, train
    from tale_jax.utils.streams import say

    config = with_base(config, workdir, given)
    with joined(config.mesh, workdir, find_place(ADDRESS.value, COUNT.value, INDEX.value)) as is_main:
        backend = start_backend(config.backend.platform)
        from_main_process(lambda: import_base(config, workdir))
        outcome = train(config, workdir, backend, given, START_TIME)
    if outcome.signal or not is_main:
        sys.exit(outcome.signal and 128 + outcome.signal)
    say(describe(outcome, workdir))
    score_valid(workdir, backend, outcome.step, SCORE.value)


if __name__ == "__main__":
    use_saved_config(sys.argv)
    run(main)
