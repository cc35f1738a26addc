"""The config of a run as a config file, for `--config`: what the workdir behind the colon was trained with.

`launch/train.py --workdir=DIR` uses it where no `--config` is given, so that flags beside it change what was saved.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tale_jax.config import Config


def get_config(workdir: str) -> Any:
    """The settings in `workdir/config.json`. Raises ValueError, in one line, where there is none or it is not sound."""
    return Config.load(Path(workdir)).to_config_dict()


def with_saved_config(args: Sequence[str]) -> list[str]:
    """The arguments of a script, program name first, with the config of their workdir where they name none.

    As they are where the workdir has no config, or there is no workdir.
    """
    workdir = re.search(r"\0--?workdir[=\0]([^\0]+)", "\0".join(["", *args[1:]]))
    if workdir is None or any(re.match(r"--?config(=.|$)", arg) for arg in args):
        return [*args]
    folder, this = os.path.expanduser(workdir[1]), str(Path(__file__).resolve())
    if not os.path.isfile(os.path.join(folder, "config.json")):
        return [*args]
    recipe = os.path.relpath(this) if ":" in this else this  # what stands behind a colon is the argument
    return [args[0], f"--config={recipe}:{folder}", *args[1:]]  # before its settings


def check_given(config: Any, workdir: Path) -> None:
    """Raises ValueError, in one line, where there is neither a config nor a run to go on with."""
    if config is None:
        raise ValueError(
            f"workdir={workdir} holds no run to go on with (no config.json there); give a recipe for a new one: "
            "--config=configs/NAME.py, or --config=configs/files.py --config.corpus.path=TEXTS for your own text"
        )
