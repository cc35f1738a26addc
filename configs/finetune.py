"""Fine-tunes a model on your text: all of its weights, or low-rank updates to them (LoRA, DoRA).

python launch/train.py --config=configs/finetune.py:lora --config.base=DIR --config.corpus.path=my-texts/ --workdir=NEW

DIR is a workdir of ours, or a Hugging Face folder (Llama or Qwen3). Model and tokenizer are those of the base;
`--config.model.seq_len=512` shortens the windows of one with a long context. The checkpoints of `:lora` and `:dora`
hold the updates alone, and the base is found again by its digest.
"""

from configs import base


def get_config(variant: str = "lora"):
    config = base.get_config()
    config.corpus.name = "files"
    config.passes = 2.0
    config.ema.decay = 0.0
    config.optimizer.weight_decay = 0.0  # the base is where the weights should stay near to
    config.optimizer.embedding_lr_multiplier = 1.0
    config.evaluate.every_steps = 100

    if variant == "full":
        config.optimizer.learning_rate = 3e-4  # as the end of pretraining: more forgets the base
    elif variant in ("lora", "dora"):
        config.lora.rank = 8
        config.lora.alpha = 16.0
        config.lora.dora = variant == "dora"
        config.optimizer.learning_rate = 2e-3  # B starts at zero: about ten times that of all weights
    else:
        raise ValueError(f"configs/finetune.py:{variant} is not a variant; there are :full, :lora and :dora")
    return config
