"""Prepares a corpus once: trains its tokenizer and writes its token windows. launch/train.py does the same when needed.

python launch/prepare.py --config=configs/tales.py --workdir=experiments/tales
"""

from pathlib import Path

from absl import flags
from cli import overrides, run
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, as configs/tales.py or configs/tales.py:tiny")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the experiment; it is made when missing")
flags.mark_flags_as_required(["config", "workdir"])


def main(_: list[str]) -> None:
    from tale_jax.config import Config
    from tale_jax.data.prepare import describe, prepare, with_vocab_size

    config, workdir = Config.build(CONFIG.value), Path(str(WORKDIR.value))
    if config.base:
        raise ValueError(f"base={config.base} is prepared by launch/train.py, which brings its tokenizer; run that")
    if config.minutes and "tokenizer.vocab_size" not in overrides("config"):
        config, reason = with_vocab_size(config, workdir)
        print(reason)
    prepared = prepare(config, workdir, workdir / "log.txt")
    for manifest in prepared.manifests.values():
        print(describe(manifest))
    print(f"windows lie in {workdir}/windows, the tokenizer in {workdir}/tokenizer")


if __name__ == "__main__":
    run(main)
