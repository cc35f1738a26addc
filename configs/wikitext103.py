"""WikiText-103 (Merity et al. 2016): fifty times WikiText-2, same validation and test text.

python launch/train.py --config=configs/wikitext103.py --config.corpus.path=DIR --workdir=experiments/wt103
"""

from configs import wikitext2


def get_config():
    config = wikitext2.get_config()
    config.corpus.name = "wikitext103"
    config.batch_size = 32  # there is text enough for larger batches
    config.micro_batch_size = 8  # in the memory that WikiText-2 takes
    config.evaluate.every_steps = 1000  # the run is longer
    config.checkpoint.every_steps = 500
    return config
