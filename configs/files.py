"""Your own text: a file, folder or glob of .txt, .md, .jsonl, .json, .csv, .tsv or .parquet, also compressed.

    python launch/train.py --config=configs/files.py --config.corpus.path=my-texts/ --workdir=experiments/mine
    python launch/train.py --config=configs/files.py --config.corpus.path='notes/*.jsonl' --config.corpus.field=body …

With `--config.minutes=30` the amount of text and the time decide vocabulary, size, length and regularisation, in place
of what stands here, but for what a flag sets.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.corpus.name = "files"
    config.passes = 2.0  # a second pass over small text costs nearly nothing in quality
    config.model.embed_dim = 256  # a larger model would soon memorise a text of one's own
    config.model.num_heads = 4  # of 64
    config.model.induction_init = True  # the model copies earlier text from the first steps on
    config.model.induction_match = True  # text repeats itself word for word

    # As in configs/wikitext2.py, but for the momentum: 0.9 gains nothing on small models and texts.
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.embedding_lr_multiplier = 2.0
    config.optimizer.normuon_beta = 0.95
    return config
