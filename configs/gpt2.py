"""A model of the size of GPT-2 small (124M), or of a billion weights, for machines with several GPUs; plan it first.

    python launch/plan.py --config=configs/gpt2.py --devices=8 --config.mesh.fsdp=8
    python launch/plan.py --config=configs/gpt2.py:1b --devices=64 --config.mesh.fsdp=16 --config.mesh.tensor=4
    python launch/train.py --config=configs/gpt2.py --workdir=experiments/gpt2 --config.mesh.fsdp=8

Neither has been trained by us: learning rates, batches and schedule are those of GPT-3's models of these sizes (Brown
et al. 2020, table 2.1). The text is FineWeb-Edu, from the hub (pip install -e '.[hub]'); another one:
--config.corpus.name=files --config.corpus.path=DIR. Several machines: launch/cluster/.
"""

from configs import base


def get_config(variant: str = ""):
    config = base.get_config()
    config.corpus.name = "hub"
    config.corpus.hub_name = "HuggingFaceFW/fineweb-edu"
    config.corpus.hub_config = "sample-10BT"  # the steps below are about one pass
    config.corpus.valid_split = ""  # it has a training split only
    config.corpus.test_split = ""
    config.tokenizer.vocab_size = 50_304  # as many as GPT-2's, up to a multiple of 128
    config.tokenizer.sample_bytes = 1_000_000_000

    config.model.num_layers = 12
    config.model.embed_dim = 768
    config.model.num_heads = 12
    config.model.seq_len = 1024
    config.model.scan_layers = True  # one layer is compiled, not twelve
    config.precision = "bfloat16"
    config.batch_size = 512  # half a million tokens
    config.micro_batch_size = 128  # of which each of 8 devices takes 16
    config.total_steps = 19_000  # ten billion tokens
    config.optimizer.learning_rate = 6e-4
    config.optimizer.embedding_lr_multiplier = 1.0
    config.schedule.name = "cosine"
    config.schedule.final_fraction = 0.1
    config.evaluate.every_steps = 500
    config.evaluate.max_windows = 1024
    config.checkpoint.every_steps = 500

    if variant == "1b":
        config.corpus.hub_config = "sample-100BT"
        config.model.num_layers = 18
        config.model.embed_dim = 2048
        config.model.num_heads = 16
        config.model.seq_len = 2048
        config.remat = "block"
        config.total_steps = 20_000  # twenty tokens a weight
        config.optimizer.learning_rate = 2e-4
    elif variant:
        raise ValueError(f"configs/gpt2.py:{variant} is not a variant; there is configs/gpt2.py:1b")
    return config
