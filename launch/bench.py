"""Measures how fast a config trains, scores and decodes on this machine, on random tokens: no data is needed.

python launch/bench.py --config=configs/m2_air.py
python launch/bench.py --config=configs/m2_air.py --only=train --sweep=model.embed_dim=192,384,768 --plot=width.png
python launch/bench.py --config=configs/m2_air.py --only=train --peer='python other_program.py' --rounds=3
python launch/bench.py --config=configs/m2_air.py --profile
python launch/bench.py --config=configs/tales.py --startup
python launch/bench.py --config=configs/m2_air.py --saving
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under `python -P`
from cli import define_path, run
from absl import flags
from ml_collections import config_flags

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "recipe, as configs/tales.py or configs/tales.py:tiny")
flags.mark_flag_as_required("config")
flags.DEFINE_list("only", "train,score,decode,decode_16", "what to measure: train, score, decode, decode_N (N streams)")
flags.DEFINE_float("seconds", 10.0, "for each measurement, about", lower_bound=0.0)
flags.DEFINE_multi_string("sweep", [], "NAME=VALUE,VALUE: a setting and its values; may be repeated")
flags.DEFINE_string("peer", "", "command of another benchmark, to take turns with; it prints JSON objects")
flags.DEFINE_integer("rounds", 3, "turns with the peer", lower_bound=1)
flags.DEFINE_bool("profile", False, "what part of a training step is products, attention, head and loss, optimizer, …")
flags.DEFINE_bool("saving", False, "time of a save, and how much of it its checks (digests, sums of files) take")
flags.DEFINE_bool("startup", False, "time to the first step and to the first sampled text; this prepares the corpus")
PLOT = define_path("plot", "file to write", "file for a plot of the rates: .png, .svg or .pdf")
flags.DEFINE_bool("json", False, "print one JSON object as the last line")


def main(_: list[str]) -> None:
    from tale_jax.bench.run import BenchRequest, bench
    from tale_jax.config import Config
    from tale_jax.utils.files import json_line

    request = BenchRequest(
        kinds=tuple(FLAGS.only),
        seconds=FLAGS.seconds,
        sweeps=tuple(FLAGS.sweep),
        peer=FLAGS.peer,
        rounds=FLAGS.rounds,
        profile=FLAGS.profile,
        startup=FLAGS.startup,
        saving=FLAGS.saving,
        flags=tuple(arg for arg in sys.argv[1:] if arg.startswith(("--config", "--only", "--seconds"))),
    )
    record = bench(Config.build(CONFIG.value), request, PLOT.value, quiet=FLAGS.json)
    if FLAGS.json:
        print(json_line(record))


if __name__ == "__main__":
    run(main)
