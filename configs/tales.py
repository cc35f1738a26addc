"""The embedded tales: a model that tells them in a few minutes on two CPU cores. `make demo` runs this.

python launch/train.py --config=configs/tales.py --workdir=experiments/tales
python launch/train.py --config=configs/tales.py:hour --workdir=experiments/tales_hour  # an hour, for the best of it
python launch/train.py --config=configs/tales.py:tiny --workdir=experiments/tiny     # seconds, for trying things out
"""

from configs import base


def get_config(variant: str = ""):
    config = base.get_config()
    config.corpus.name = "tales"
    config.corpus.num_train_tales = 20_000
    config.tokenizer.vocab_size = 3072  # nearly every word is one piece
    config.windows = "document"  # every tale is told for itself, from its beginning

    config.model.num_layers = 4
    config.model.embed_dim = 192
    config.model.num_heads = 2  # few and wide: they find names by what they are, from far away
    config.model.seq_len = 208  # the longest tale
    config.model.mask_documents = True

    # Names, places and things are copied from earlier in the tale. A model learns that after so many steps rather than
    # so many tokens, sooner with Muon, and soonest from weights that have begun to: small batches, many steps.
    config.model.induction_init = True
    config.batch_size = 8
    config.total_steps = 2000
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.embedding_rate = 10.0

    config.evaluate.every_steps = 250
    config.evaluate.max_windows = 64
    config.checkpoint.every_steps = 250
    config.sample.num_samples = 1
    config.sample.max_tokens = 207

    if variant == "hour":
        config.corpus.num_train_tales = 150_000
        config.model.embed_dim = 256
        config.model.num_heads = 2
        config.total_steps = 18_000
        config.evaluate.every_steps = 1500
        config.checkpoint.every_steps = 1500
    elif variant == "tiny":
        config.corpus.num_train_tales = 400
        config.corpus.num_valid_tales = 40
        config.corpus.num_test_tales = 40
        config.tokenizer.vocab_size = 512
        config.model.num_layers = 2
        config.model.embed_dim = 64
        config.model.num_heads = 2
        config.batch_size = 4
        config.total_steps = 20
        config.evaluate.every_steps = 10
        config.evaluate.max_windows = 8
        config.checkpoint.every_steps = 10
        config.sample.max_tokens = 30
    elif variant:
        raise ValueError(f"configs/tales.py:{variant} is not a variant; there are :hour and :tiny")
    return config
