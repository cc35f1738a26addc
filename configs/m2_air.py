"""The configuration recommended for an 8 GB M2 MacBook Air, to the letter; `:tuned` has the better values we know of.

    python launch/train.py --config=configs/m2_air.py --config.corpus.path=DIR --workdir=experiments/m2_air
    python launch/train.py --config=configs/m2_air.py:tuned --config.corpus.path=DIR --workdir=experiments/m2_air_tuned

DIR holds WikiText-2 as in configs/wikitext2.py; another text: --config.corpus.name=files.
"""

from configs import base


def get_config(variant: str = ""):
    config = base.get_config()
    config.corpus.name = "wikitext2"
    config.tokenizer.vocab_size = 8192
    config.model.embed_dim = 384
    config.model.num_layers = 6
    config.model.num_heads = 6
    config.model.seq_len = 256
    config.batch_size = 8
    config.passes = 4.0  # repeated text is nearly as good as new for so many
    config.optimizer.learning_rate = 3e-4
    config.optimizer.embedding_rate = 1.0
    config.schedule.name = "cosine"
    config.schedule.warmup_steps = 1000
    config.remat = "block"
    config.model.scan_layers = True  # less memory to compile; remat that no compiler undoes
    config.precision = "bfloat16"  # mixed: float32 weights, products in bfloat16
    config.model.qk_norm = False
    config.model.scale_embeddings = False
    config.model.zero_init_outputs = False
    config.evaluate.every_steps = 500
    config.checkpoint.every_steps = 500

    if variant == "tuned":
        # As in configs/wikitext2.py. At this size 3e-4 is about ten times too low, and warmup takes 2 % of a run.
        config.optimizer.name = "muon"
        config.optimizer.learning_rate = 5e-3
        config.optimizer.embedding_rate = 2.0  # each row of the embedding sees few steps
        config.optimizer.neuron_beta = 0.95
        config.optimizer.momentum = 0.9
        config.model.induction_init = True
        config.model.induction_match = True  # text repeats itself word for word; tales do not
        config.schedule.warmup_steps = 0
        config.schedule.name = "linear"  # to zero
        config.model.qk_norm = True  # keeps the higher rate stable
        config.precision = "auto"  # bfloat16 only where the machine is faster at it; an M2 has no native path
        config.model.scale_embeddings = True  # rare tokens keep a voice of their own among the blocks
        config.model.zero_init_outputs = True  # every block begins as the identity
    elif variant:
        raise ValueError(f"configs/m2_air.py:{variant} is not a variant; there is configs/m2_air.py:tuned")
    return config
