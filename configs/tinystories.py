"""TinyStories (Eldan and Li 2023): stories in the words of small children, by a large model.

    python launch/train.py --config=configs/tinystories.py --config.corpus.path=DIR --workdir=experiments/tinystories

DIR holds TinyStories-train.txt and TinyStories-valid.txt; without it the hub is asked (pip install -e '.[hub]').
"""

from configs import base


def get_config():
    config = base.get_config()
    config.corpus.name = "tinystories"
    config.total_steps = 20_000  # of some hundred thousand that one pass takes
    config.batch_size = 16
    config.evaluate.every_steps = 1000  # twenty times in the run
    config.evaluate.max_windows = 512
    config.checkpoint.every_steps = 500
    config.sample.prompt = "Once upon a time"  # how most of the stories begin
    return config
