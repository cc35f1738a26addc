"""Prepares a corpus once: trains its tokenizer and writes its token windows. launch/train.py does the same when needed.

python launch/prepare.py --config=configs/tales.py --workdir=experiments/tales
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import define_path, overrides, run
from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, as configs/tales.py or configs/tales.py:tiny")
WORKDIR = define_path("workdir", "folder to write", "folder of the experiment; it is made when missing", required=True)
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    from tale_jax.config import Config
    from tale_jax.data.prepare import describe, prepare, with_vocab_size
    from tale_jax.utils.streams import say

    config, workdir = Config.build(CONFIG.value), WORKDIR.value
    if config.base:
        from tale_jax.convert.formats import import_base, with_base

        config = with_base(config, workdir, overrides("config"))
        import_base(config, workdir)
    if config.minutes and "tokenizer.vocab_size" not in overrides("config"):
        config, reason = with_vocab_size(config, workdir)
        say(reason)
    prepared = prepare(config, workdir, workdir / "log.txt")
    for manifest in prepared.manifests.values():
        say(describe(manifest))
    say(f"windows lie in {workdir}/windows, the tokenizer in {workdir}/tokenizer")


if __name__ == "__main__":
    run(main)
