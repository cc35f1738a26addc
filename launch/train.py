"""Trains a model, or goes on with the run of a workdir.

python launch/train.py --config=configs/tales.py --workdir=experiments/tales
python launch/train.py --config=configs/files.py --config.corpus.path=my-texts/ --workdir=experiments/mine
python launch/train.py --workdir=experiments/mine
python launch/train.py --workdir=experiments/mine --config.total_steps=4000

Without --config the run in the workdir goes on with its own settings; those given beside it change or check them.
"""

import sys
from pathlib import Path

from absl import flags
from cli import START_TIME, overrides, run
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, as configs/tales.py; left out: that of the workdir")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the experiment; it is made when missing, else resumed")
flags.mark_flag_as_required("workdir")


def main(_: list[str]) -> None:
    from tale_jax.config import Config
    from tale_jax.runs.saved_config import check_given

    workdir = Path(WORKDIR.value)
    check_given(CONFIG.value, workdir)
    config, given = Config.build(CONFIG.value, overrides("config")), overrides("config")
    from tale_jax.hardware.backend import start_backend  # JAX is imported when the config is known to be right
    from tale_jax.runs.train import train

    outcome = train(config, workdir, start_backend(config.backend.platform), given, START_TIME)
    if outcome.signal:
        sys.exit(128 + outcome.signal)
    print(outcome.describe(workdir))


if __name__ == "__main__":
    from tale_jax.runs.saved_config import with_saved_config

    sys.argv = with_saved_config(sys.argv)
    run(main)
