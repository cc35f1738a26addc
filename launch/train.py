"""Trains a model, or goes on with the run of a workdir.

python launch/train.py --config=configs/tales.py --workdir=experiments/tales
python launch/train.py --config=configs/files.py --config.corpus.path=my-texts/ --workdir=experiments/mine
python launch/train.py --workdir=experiments/mine
python launch/train.py --workdir=experiments/mine --config.total_steps=4000

Without --config the run in the workdir goes on with its own settings; those given beside it change or check them.
"""

import os
import re
import shlex
import sys
from pathlib import Path

from absl import flags
from cli import START_TIME, overrides, run
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, as configs/tales.py; left out: that of the workdir")
SAVED_CONFIG = Path(__file__).resolve().parents[1] / "tale_jax" / "runs" / "saved_config.py"
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the experiment; it is made when missing, else resumed")
flags.mark_flag_as_required("workdir")


def main(_: list[str]) -> None:
    from tale_jax.config import Config

    workdir = Path(WORKDIR.value)
    if CONFIG.value is None:
        raise ValueError(
            f"workdir={workdir} holds no run to go on with (no config.json there); give a recipe for a new one: "
            "--config=configs/NAME.py, or --config=configs/files.py --config.corpus.path=TEXTS for your own text"
        )
    given = overrides("config")
    config = Config.build(CONFIG.value, given)
    from tale_jax.hardware.backend import start_backend  # JAX is imported when the config is known to be right
    from tale_jax.runs.train import train

    outcome = train(config, workdir, start_backend(config.backend.platform), given, START_TIME)
    if outcome.signal:
        sys.exit(128 + outcome.signal)
    print(f"{workdir} has finished its {outcome.total_steps} steps; the model: {workdir}/checkpoints/{outcome.step}")
    if outcome.first_step == outcome.step:
        longer = f"--workdir={shlex.quote(str(workdir))} --config.total_steps={2 * outcome.total_steps}"
        print(f"nothing was left to do; to train longer: python launch/train.py {longer}")


def _use_saved_config(args: list[str]) -> None:
    """Adds the config that the workdir was trained with, where the arguments name none."""
    workdir = re.search(r"\0--?workdir[=\0]([^\0]+)", "\0".join(["", *args[1:]]))
    if workdir is None or any(re.match(r"--?config(=|$)", arg) for arg in args):
        return
    folder = os.path.expanduser(workdir[1])
    if os.path.isfile(os.path.join(folder, "config.json")):
        recipe = str(SAVED_CONFIG) if ":" not in str(SAVED_CONFIG) else os.path.relpath(SAVED_CONFIG)
        args.insert(1, f"--config={recipe}:{folder}")  # its settings must stand behind it


if __name__ == "__main__":
    _use_saved_config(sys.argv)
    run(main)
