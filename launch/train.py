"""Trains a model, or resumes the training of a workdir.

python launch/train.py --config=configs/tales.py --workdir=experiments/tales
python launch/train.py --config=configs/files.py --config.corpus.path=my-texts/ --workdir=experiments/mine
"""

import sys
from pathlib import Path

from absl import flags
from cli import START_TIME, overrides, run
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, as configs/tales.py or configs/tales.py:tiny")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the experiment; it is made when missing, else resumed")
flags.mark_flags_as_required(["config", "workdir"])


def main(_: list[str]) -> None:
    from tale_jax.config import Config

    config, workdir = Config.build(CONFIG.value), Path(WORKDIR.value)
    from tale_jax.convert.formats import import_base, with_base
    from tale_jax.hardware.backend import start_backend  # JAX is imported when the config is known to be right
    from tale_jax.runs.train import train

    config = with_base(config, workdir, overrides("config"))
    import_base(config, workdir)
    outcome = train(config, workdir, start_backend(config.backend.platform), overrides("config"), START_TIME)
    if outcome.signal:
        sys.exit(128 + outcome.signal)
    print(f"{workdir} has finished its {outcome.total_steps} steps; the model: {workdir}/checkpoints/{outcome.step}")


if __name__ == "__main__":
    run(main)
