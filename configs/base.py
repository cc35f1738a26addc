"""Every setting at its default. Recipes call this and assign only what differs.

    python launch/train.py --config=configs/base.py --workdir=experiments/base --config.seed=1

The settings stand in `tale_jax/config.py`, each with its unit and its rule. "Off" is 0 or "": a flag cannot set None.
"""

import ml_collections

from tale_jax.config import Config


def get_config() -> ml_collections.ConfigDict:
    return Config().to_config_dict()
