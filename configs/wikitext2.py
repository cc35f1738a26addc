"""WikiText-2 (Merity et al. 2016), the word-level release, one pass; bits and perplexities compare with published ones.

    python launch/train.py --config=configs/wikitext2.py --config.corpus.path=DIR --workdir=experiments/wt2
    python launch/train.py --config=configs/wikitext2.py:best --config.corpus.path=DIR --workdir=experiments/wt2_best

`:best` is for quality: 12 passes, two and a half hours on two CPU cores, and a context of 512 that
`evaluate.py --stride=64` slides over the text. Its learning rate stays up until the last quarter, so that a run may be
made shorter or longer until then: stop it, and go on with another `--config.total_steps`. DIR holds train.txt,
valid.txt and test.txt, or wiki.train.tokens and so on; without it the hub is asked.
"""

from configs import base


def get_config(variant: str = ""):
    config = base.get_config()
    config.corpus.name = "wikitext2"
    config.tokenizer.vocab_size = 8192  # the text has 33,278 words, most of them rare
    # One change at a time, over a quarter of a pass, is measured in the logbook, wikitext2.md.
    config.model.induction_init = True  # the model copies earlier text from the first steps on
    config.model.induction_match = True  # text repeats itself word for word; tales do not
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.embedding_lr_multiplier = 2.0
    config.optimizer.normuon_beta = 0.95
    config.optimizer.momentum = 0.9  # the shorter the run, the more it matters
    config.checkpoint.every_steps = 100  # an interruption costs a fourteenth of the run at most
    config.sample.prompt = " = "  # how an article begins

    if variant == "best":
        config.passes = 12.0
        config.model.seq_len = 512
        # Text seen again is memorised unless that is made hard. One pass needs nothing of this.
        config.model.dropout = 0.15
        config.model.embedding_dropout = 0.1
        config.optimizer.weight_decay = 0.4
        config.optimizer.learning_rate = 3.5e-3
        config.optimizer.momentum = 0.95  # the default: the run is long
        config.schedule.name = "wsd"  # the learning rate stays up until the last quarter
        config.schedule.warmup_steps = 200
        config.schedule.decay_fraction = 0.25
        # More than half of the run on windows of 256 tokens, which take less time. Until then validation, in windows of
        # 512, may rise: the model has not met such positions.
        config.schedule.short_seq_fraction = 0.6
        config.ema.decay = 0.998
        config.evaluate.every_steps = 680  # a pass
        config.checkpoint.every_steps = 340
    elif variant:
        raise ValueError(f"configs/wikitext2.py:{variant} is not a variant; there is configs/wikitext2.py:best")
    return config
