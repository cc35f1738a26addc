"""Trains a model, or resumes the training of a workdir.

python launch/train.py --config=configs/tales.py --workdir=experiments/tales
python launch/train.py --config=configs/files.py --config.corpus.path=my-texts/ --workdir=experiments/mine
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import START_TIME, define_path, overrides, run
from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, as configs/tales.py or configs/tales.py:tiny")
WORKDIR = define_path(
    "workdir", "folder to write", "folder of the experiment; it is made when missing, else resumed", required=True
)
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    from tale_jax.config import Config

    config, workdir = Config.build(CONFIG.value), WORKDIR.value
    from tale_jax.hardware.backend import start_backend  # JAX is imported when the config is known to be right
    from tale_jax.runs.train import train
    from tale_jax.utils.streams import say

    outcome = train(config, workdir, start_backend(config.backend.platform), overrides("config"), START_TIME)
    if outcome.signal:
        sys.exit(128 + outcome.signal)
    say(f"{workdir} has finished its {outcome.total_steps} steps; the model: {workdir}/checkpoints/{outcome.step}")


if __name__ == "__main__":
    run(main)
