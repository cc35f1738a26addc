"""The configuration recommended for an 8 GB M2 MacBook Air, unchanged; `:tuned` has the better values we know of.

    python launch/train.py --config=configs/m2_air.py --config.corpus.path=DIR --workdir=experiments/m2_air
    python launch/train.py --config=configs/m2_air.py:tuned --config.corpus.path=DIR --workdir=experiments/m2_air_tuned

DIR holds WikiText-2 as in configs/wikitext2.py; another text: --config.corpus.name=files.
"""

from configs import base


def get_config(variant: str = ""):
    config = base.get_config()
    # What is recommended: 6 layers of width 384, 6 heads, context 256 and batches of 8 are the defaults.
    config.corpus.name = "wikitext2"
    config.tokenizer.vocab_size = 8192
    config.passes = 4.0  # repeated text is nearly as good as new for so many
    config.optimizer.learning_rate = 3e-4
    config.optimizer.embedding_lr_multiplier = 1.0  # one learning rate for all weights
    config.schedule.name = "cosine"
    config.schedule.warmup_steps = 1000
    config.remat = "block"
    config.model.scan_layers = True  # less memory to compile; remat that no compiler undoes
    config.precision = "bfloat16"  # mixed: float32 weights, products in bfloat16
    # A plain transformer, without what the defaults add to it.
    config.model.qk_norm = False
    config.model.scale_embeddings = False
    config.model.zero_init_outputs = False
    config.evaluate.every_steps = 500  # about ten times in the run
    config.checkpoint.every_steps = 500

    if variant == "tuned":
        # As in configs/wikitext2.py. At this size 3e-4 is about ten times too low, and warmup takes 2 % of a run.
        config.optimizer.name = "muon"
        config.optimizer.learning_rate = 5e-3
        config.optimizer.embedding_lr_multiplier = 2.0  # each row of the embedding sees few steps
        config.optimizer.normuon_beta = 0.95
        config.optimizer.momentum = 0.9
        config.model.induction_init = True
        config.model.induction_match = True  # text repeats itself word for word; tales do not
        config.schedule.warmup_steps = 0
        config.schedule.name = "linear"  # to zero
        config.model.qk_norm = True  # keeps the higher learning rate stable
        config.precision = "auto"  # bfloat16 only where the machine is faster at it; an M2 computes it in software
        config.model.scale_embeddings = True  # the blocks do not outweigh the embeddings of rare tokens
        config.model.zero_init_outputs = True  # every block begins as the identity
    elif variant:
        raise ValueError(f"configs/m2_air.py:{variant} is not a variant; there is configs/m2_air.py:tuned")
    return config
