"""The config of a run as a config file, for `--config`: what the workdir behind the colon was trained with.

`launch/train.py --workdir=DIR` uses it where no `--config` is given, so that flags beside it change what was saved.
"""

from pathlib import Path
from typing import Any

from tale_jax.config import Config


def get_config(workdir: str) -> Any:
    """The settings in `workdir/config.json`. Raises ValueError, in one line, where there is none or it is not sound."""
    return Config.load(Path(workdir)).to_config_dict()
