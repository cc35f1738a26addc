"""Your own text: a file, folder or glob of .txt, .jsonl or .parquet.

    python launch/train.py --config=configs/files.py --config.corpus.path=my-texts/ --workdir=experiments/mine
    python launch/train.py --config=configs/files.py --config.corpus.path='notes/*.jsonl' --config.corpus.field=body …

With `--config.minutes=30` the amount of text and the time decide vocabulary, size, length and regularisation, in place
of what stands here, but for what a flag sets.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.corpus.name = "files"
    config.tokenizer.vocab_size = 4096
    config.passes = 2.0  # a second pass over small text costs nearly nothing in quality
    config.batch_size = 8
    config.model.num_layers = 6
    config.model.embed_dim = 256
    config.model.num_heads = 4
    config.model.seq_len = 256
    config.model.induction_init = True
    config.model.induction_match = True
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.embedding_rate = 2.0
    config.optimizer.neuron_beta = 0.95
    config.evaluate.every_steps = 200
    config.checkpoint.every_steps = 200
    return config
