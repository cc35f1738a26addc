"""Every setting of a run, once, with its unit and its off value. Recipes call this and assign only what differs.

    python launch/train.py --config=configs/tales.py --workdir=experiments/tales --config.seed=1

"Off" is 0 or "": a flag cannot set None. What the values must satisfy stands in `tale_jax/config.py`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.seed = 0  # of initial weights, data order and dropout
    config.total_steps = 0  # optimizer steps; 0: as many as `passes` takes
    config.passes = 1.0  # passes over the training windows, when total_steps is 0
    config.minutes = 0.0  # that all of a run may take: they decide its vocabulary, size and length; 0: off
    config.batch_size = 8  # sequences in one optimizer step
    config.micro_batch_size = 0  # sequences in one forward and backward pass; 0: batch_size (no accumulation)
    config.precision = "auto"  # of computing: auto, float32, bfloat16 or float16; weights are always float32
    config.windows = (
        "stream"  # stream: text cut wherever a window is full; document: each window begins with a document
    )
    config.remat = "none"  # recompute in the backward pass: none, block, or a name in jax.checkpoint_policies

    config.corpus = corpus = ml_collections.ConfigDict()
    corpus.name = "tales"  # tales, wikitext2, wikitext103, tinystories, files or hub
    corpus.path = ""  # file, folder or glob to read; "": the hub (or nothing, for tales)
    corpus.field = "text"  # name of the text in .jsonl, .parquet and hub rows
    corpus.hub_name = ""  # dataset on the Hugging Face hub, for corpus.name=hub
    corpus.hub_config = ""  # its configuration; "": the default one
    corpus.train_split = "train"  # hub names of the three splits; "": cut by hash from the training split
    corpus.valid_split = "validation"
    corpus.test_split = "test"
    corpus.held_out = 0.05  # share of documents cut by hash for valid, and again for test
    corpus.max_train_bytes = 0  # stop the training split after so many bytes of text; 0: all of it
    corpus.num_train_tales = 20_000  # tales told for each split
    corpus.num_valid_tales = 500
    corpus.num_test_tales = 500

    config.tokenizer = tokenizer = ml_collections.ConfigDict()
    tokenizer.vocab_size = 4096  # pieces, bytes and marks included
    tokenizer.path = ""  # an existing SentencePiece .model to use; "": train one on the training split
    tokenizer.sample_bytes = 50_000_000  # text the tokenizer is trained on, at most

    config.model = model = ml_collections.ConfigDict()
    model.num_layers = 6
    model.embed_dim = 384
    model.num_heads = 6
    model.num_kv_heads = 0  # key/value heads shared by the query heads; 0: num_heads
    model.mlp_dim = 0  # width of the gated MLP; 0: 8/3 of embed_dim, rounded up to a multiple of 64
    model.seq_len = 256  # context, in tokens
    model.rope_base = 10_000.0  # base of the rotary frequencies
    model.norm_eps = 1e-5
    model.qk_norm = True  # RMS-normalise queries and keys
    model.tie_embeddings = True  # one table for embedding and head
    model.scale_embeddings = True  # by sqrt(embed_dim), so that a token's own vector is not drowned by the blocks
    model.zero_init_outputs = True  # start the two output projections of each block at zero
    model.induction_init = False  # start one head of each layer as what copying from earlier in a text needs
    model.induction_match = False  # with it: heads above the first layer start out looking for the present token
    model.dropout = 0.0  # of embeddings and block outputs while training, to the nearest 1/256; 0: off
    model.word_dropout = 0.0  # share of the vocabulary whose input embeddings are dropped in a pass; 0: off
    model.logit_softcap = 0.0  # logits = cap * tanh(logits / cap); 0: off
    model.mask_documents = False  # attention stays inside one document
    model.scan_layers = False  # one compiled layer in a loop: faster to compile, somewhat slower to run

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.name = "adamw"  # of the matrices in the blocks: adamw, muon or lion; Adam for everything else
    optimizer.learning_rate = 2e-3  # peak
    optimizer.embedding_rate = 3.0  # learning rate of embedding, head and norm scales, as a multiple of the peak
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.95
    optimizer.eps = 1e-8
    optimizer.momentum = 0.95  # of muon
    optimizer.momentum_warmup_steps = 0  # muon's momentum rises from 0.85 over so many steps; 0: off
    optimizer.neuron_beta = 0.0  # of muon: updates of each neuron over a mean of their size, of that decay; 0: off
    optimizer.weight_decay = 0.1  # of the matrices in the blocks; 0: off. Norm scales are never decayed
    optimizer.embedding_decay = 0.0  # of embedding and head; 0: off
    optimizer.decay_schedule = "rate"  # decay is times the learning rate: rate (of the step) or constant (the peak)
    optimizer.cautious = False  # decay a weight only where the step, too, makes it smaller
    optimizer.clip_norm = 1.0  # largest global gradient norm; 0: off

    config.schedule = schedule = ml_collections.ConfigDict()
    schedule.name = "linear"  # after warmup: linear, cosine or wsd (warmup, stable, decay)
    schedule.warmup_steps = 0  # 0: 2 % of the run
    schedule.final_fraction = 0.0  # learning rate at the end, as a fraction of the peak
    schedule.decay_fraction = 0.2  # share of the run that wsd decays over
    schedule.short_fraction = 0.0  # share of the run, its first, that trains on shorter windows; 0: off
    schedule.short_cut = 2  # pieces that each window is then cut into; the tokens of a step stay the same
    schedule.small_fraction = 0.0  # share of the run, its first, that trains on smaller batches; 0: off
    schedule.small_divisor = 2  # parts that each batch is then divided into, an update for each, all in one step

    config.average = average = ml_collections.ConfigDict()
    average.decay = 0.0  # of a moving average of the weights, which validation and samples use; 0: off

    config.evaluate = evaluate = ml_collections.ConfigDict()
    evaluate.every_steps = 200  # 0: only at the end
    evaluate.max_windows = 128  # windows of the valid split used while training; 0: all
    evaluate.batch_size = 0  # sequences scored at once; 0: micro_batch_size

    config.sample = sample = ml_collections.ConfigDict()
    sample.every_steps = 0  # samples along the training; 0: as often as evaluation
    sample.prompt = ""  # "": start of a document
    sample.num_samples = 2
    sample.max_tokens = 120
    sample.temperature = 0.7

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every_steps = 200  # 0: only at the end
    checkpoint.keep = 2  # newest checkpoints kept, besides the best by validation loss

    config.metrics = metrics = ml_collections.ConfigDict()
    metrics.every_steps = 10  # one record in metrics.jsonl, averaged over the steps since the last
    metrics.tensorboard = False  # also write workdir/tensorboard
    metrics.wandb = "off"  # Weights & Biases: off, offline or online
    metrics.wandb_project = "tale_jax"

    config.mesh = mesh = ml_collections.ConfigDict()
    mesh.data = 0  # devices that share the batch; 0: all that fsdp leaves
    mesh.fsdp = 1  # devices that share the batch and the weights

    config.backend = backend = ml_collections.ConfigDict()
    backend.platform = "auto"  # auto, cpu, metal or cuda
    backend.memory_gb = 0.0  # memory a run may plan for, in 10^9 bytes; 0: what the machine (or its GPU) has
    backend.ignore_memory = False  # start even what the plan says cannot fit

    return config
