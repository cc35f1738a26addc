"""The embedded tales: a model that tells them in a few minutes on two CPU cores. `make demo` runs this.

python launch/train.py --config=configs/tales.py --workdir=experiments/tales
python launch/train.py --config=configs/tales.py:hour --workdir=experiments/tales_hour  # an hour, for the best of it
python launch/train.py --config=configs/tales.py:tiny --workdir=experiments/tiny     # seconds, for trying things out
"""

from configs import base


def get_config(variant: str = ""):
    config = base.get_config()
    config.tokenizer.vocab_size = 3072  # nearly every word is one token
    config.windows = "document"  # every window is one tale, from its beginning

    config.model.num_layers = 4  # as large as a few minutes can train
    config.model.embed_dim = 192
    config.model.num_heads = 2  # few and wide: a head finds a name by its embedding, from far away
    config.model.seq_len = 208  # the longest tale
    config.model.mask_documents = True  # a tale says nothing about the next

    # Names, places and things are copied from earlier in the tale. A model learns that after so many steps rather than
    # so many tokens, sooner with Muon, and soonest from weights that have begun to: small batches, many steps.
    config.model.induction_init = True
    config.total_steps = 2000
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.embedding_lr_multiplier = 10.0  # each row of the embedding sees few steps

    config.evaluate.every_steps = 250  # eight times in the run
    config.evaluate.max_windows = 64
    config.checkpoint.every_steps = 250
    config.sample.num_samples = 1
    config.sample.max_tokens = 207  # a whole tale

    if variant == "hour":
        config.corpus.num_train_tales = 150_000  # about one pass
        config.model.embed_dim = 256
        config.total_steps = 18_000
        config.evaluate.every_steps = 1500
        config.checkpoint.every_steps = 1500
    elif variant == "tiny":  # everything as small as still shows that it works
        config.corpus.num_train_tales = 400
        config.corpus.num_valid_tales = 40
        config.corpus.num_test_tales = 40
        config.tokenizer.vocab_size = 512
        config.model.num_layers = 2
        config.model.embed_dim = 64
        config.batch_size = 4
        config.total_steps = 20
        config.evaluate.every_steps = 10
        config.evaluate.max_windows = 8
        config.checkpoint.every_steps = 10
        config.sample.max_tokens = 30
    elif variant:
        there_is = "configs/tales.py:hour and configs/tales.py:tiny"
        raise ValueError(f"configs/tales.py:{variant} is not a variant; there is {there_is}")
    return config
