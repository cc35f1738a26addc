"""What a run is: every setting once, with its type, default, unit, off value, choices and rule.

A setting is one field of one frozen dataclass below. `configs/base.py` makes an `ml_collections` config of the
defaults, and recipes assign what differs. `Config.build` checks the whole before anything else happens, so that a
mistake costs a second and not an hour. Nothing downstream reads a setting with a default of its own: what is derived
from other settings is derived here.

    config = Config.build(recipe.get_config())
    config.save(workdir)  # workdir/config.json, read again by Config.load
    settings()["schedule.warmup_steps"].help  # what it is, for people
"""

import codecs
import dataclasses
import difflib
import encodings.aliases
import functools
import json
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from tale_jax.utils.files import check_entries, check_inside, json_object, write_atomically
from tale_jax.utils.manifests import digest_of
from tale_jax.utils.paths import quoted
from tale_jax.utils.settings import (
    Broken,
    Group,
    Setting,
    above_zero_share,
    at_most,
    below_half,
    below_one,
    format_value,
    group,
    iter_settings,
    mistake,
    nearest_divisor,
    not_negative,
    positive,
    setting,
    share,
)

CORPORA = ("tales", "tales_chat", "wikitext2", "wikitext103", "tinystories", "files", "hub")
PLATFORMS = ("auto", "cpu", "metal", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("linear", "cosine", "wsd")
REMAT_POLICIES = ("nothing_saveable", "everything_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")
REMAT = ("none", "block", *REMAT_POLICIES)  # those are names in jax.checkpoint_policies
WANDB_MODES = ("off", "offline", "online")
WINDOWS = ("stream", "document")
OPTIMIZERS = ("adamw", "muon")
LOSS_ON = ("assistant", "all")
MATRICES = ("query", "key", "value", "output", "gate", "up", "down")  # the linear layers of a block
TUNABLE = ("seq_len", "dropout", "embedding_dropout", "mask_documents", "scan_layers")  # of a base's `model` settings
ON_SPIKE = ("skip", "stop", "off")

MIN_VOCAB_SIZE = 256 + 4 + 1  # a token for each byte, four special tokens, a character of the text
UNKNOWN_TOTAL_STEPS = 1 << 30  # of a run whose length is not known before its text is there; also the longest run
WARMUP_SHARE = 0.02  # of the run, where schedule.warmup_steps is 0

FORMAT = 4  # of config.json
FIRST_WITH_DIGEST = 3
MAX_BYTES = 1 << 20  # of config.json, which has some kilobytes
# Settings that an older format had not, by the format that brought them, with values that change nothing.
NEW_SETTINGS: dict[int, dict[str, Any]] = {
    2: {"corpus": {"encoding": "", "changed": ""}},
    3: {
        "base": "",
        "loss_on": "assistant",
        "on_spike": "skip",
        "model": {"head_dim": 0, "rope_scaling": 0.0, "rope_original_len": 8192},
        "checkpoint": {"keep_every": 0},
        "lora": {"rank": 0, "alpha": 16.0, "dropout": 0.0, "rank_stabilized": False, "dora": False, "matrices": ""},
    },
    4: {"mesh": {"processes": 0, "tensor": 1}},
}


def _with_settings(new: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` with what they lack of `new`: settings, groups, and settings of groups; a group that is none stays."""
    groups = {name: part for name, part in new.items() if isinstance(part, dict)}
    old = {name: groups.get(name, {}) | part if isinstance(part, dict) else part for name, part in values.items()}
    return new | old


# From format 1 on every format loads: an entry n makes values of format n into those of format n + 1.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    number - 1: functools.partial(_with_settings, new) for number, new in NEW_SETTINGS.items()
}

# Names from before format 1, for whoever still writes them.
RENAMED = {
    "model.word_dropout": "model.embedding_dropout",
    "optimizer.embedding_rate": "optimizer.embedding_lr_multiplier",
    "optimizer.neuron_beta": "optimizer.normuon_beta",
    "schedule.short_fraction": "schedule.short_seq_fraction",
    "schedule.short_cut": "schedule.seq_len_divisor",
    "average": "ema",
    "average.decay": "ema.decay",
}
REMOVED = {
    "model.logit_softcap",
    "optimizer.momentum_warmup_steps",
    "optimizer.embedding_decay",
    "optimizer.decay_schedule",
    "optimizer.cautious",
    "schedule.small_fraction",
    "schedule.small_divisor",
}
# What the settings are called elsewhere: nanoGPT, Hugging Face, PyTorch, LLaMA. Without "_", "-" and case.
COMMON_NAMES = {
    "lr": "optimizer.learning_rate",
    "learningrate": "optimizer.learning_rate",
    "maxlr": "optimizer.learning_rate",
    "peaklr": "optimizer.learning_rate",
    "minlr": "schedule.final_fraction",
    "lrscheduler": "schedule.name",
    "lrschedulertype": "schedule.name",
    "scheduler": "schedule.name",
    "lrdecay": "schedule.name",
    "warmup": "schedule.warmup_steps",
    "warmupiters": "schedule.warmup_steps",
    "numwarmupsteps": "schedule.warmup_steps",
    "warmupratio": "schedule.warmup_steps",
    "optim": "optimizer.name",
    "opt": "optimizer.name",
    "optimizertype": "optimizer.name",
    "wd": "optimizer.weight_decay",
    "l2": "optimizer.weight_decay",
    "adambeta1": "optimizer.beta1",
    "adambeta2": "optimizer.beta2",
    "b1": "optimizer.beta1",
    "b2": "optimizer.beta2",
    "adamepsilon": "optimizer.eps",
    "epsilon": "optimizer.eps",
    "gradclip": "optimizer.clip_norm",
    "maxgradnorm": "optimizer.clip_norm",
    "clip": "optimizer.clip_norm",
    "clipgradnorm": "optimizer.clip_norm",
    "gradientclip": "optimizer.clip_norm",
    "bs": "batch_size",
    "batch": "batch_size",
    "batchsize": "batch_size",
    "globalbatchsize": "batch_size",
    "trainbatchsize": "batch_size",
    "microbatch": "micro_batch_size",
    "microbatchsize": "micro_batch_size",
    "devicebatchsize": "micro_batch_size",
    "perdevicetrainbatchsize": "micro_batch_size",
    "gradientaccumulationsteps": "micro_batch_size",
    "gradaccum": "micro_batch_size",
    "accumulationsteps": "micro_batch_size",
    "evalbatchsize": "evaluate.batch_size",
    "perdeviceevalbatchsize": "evaluate.batch_size",
    "epoch": "passes",
    "epochs": "passes",
    "numepochs": "passes",
    "numtrainepochs": "passes",
    "maxepochs": "passes",
    "steps": "total_steps",
    "maxsteps": "total_steps",
    "maxiters": "total_steps",
    "iters": "total_steps",
    "iterations": "total_steps",
    "numsteps": "total_steps",
    "numiterations": "total_steps",
    "trainsteps": "total_steps",
    "time": "minutes",
    "maxminutes": "minutes",
    "dtype": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "mixedprecision": "precision",
    "randomseed": "seed",
    "rngseed": "seed",
    "gradientcheckpointing": "remat",
    "checkpointing": "remat",
    "ctx": "model.seq_len",
    "contextlength": "model.seq_len",
    "contextsize": "model.seq_len",
    "contextwindow": "model.seq_len",
    "context": "model.seq_len",
    "blocksize": "model.seq_len",
    "sequencelength": "model.seq_len",
    "seqlength": "model.seq_len",
    "maxseqlen": "model.seq_len",
    "maxlength": "model.seq_len",
    "maxpositionembeddings": "model.seq_len",
    "nctx": "model.seq_len",
    "npositions": "model.seq_len",
    "layers": "model.num_layers",
    "nlayer": "model.num_layers",
    "nlayers": "model.num_layers",
    "numhiddenlayers": "model.num_layers",
    "depth": "model.num_layers",
    "numblocks": "model.num_layers",
    "heads": "model.num_heads",
    "nhead": "model.num_heads",
    "nheads": "model.num_heads",
    "numattentionheads": "model.num_heads",
    "nkvhead": "model.num_kv_heads",
    "nkvheads": "model.num_kv_heads",
    "kvheads": "model.num_kv_heads",
    "numkeyvalueheads": "model.num_kv_heads",
    "nembd": "model.embed_dim",
    "dim": "model.embed_dim",
    "dmodel": "model.embed_dim",
    "modeldim": "model.embed_dim",
    "hiddensize": "model.embed_dim",
    "hiddendim": "model.embed_dim",
    "embeddingdim": "model.embed_dim",
    "embdim": "model.embed_dim",
    "embedsize": "model.embed_dim",
    "width": "model.embed_dim",
    "ffndim": "model.mlp_dim",
    "ffdim": "model.mlp_dim",
    "dff": "model.mlp_dim",
    "intermediatesize": "model.mlp_dim",
    "mlpwidth": "model.mlp_dim",
    "ropetheta": "model.rope_base",
    "rmsnormeps": "model.norm_eps",
    "layernormeps": "model.norm_eps",
    "tieweights": "model.tie_embeddings",
    "tiewordembeddings": "model.tie_embeddings",
    "weighttying": "model.tie_embeddings",
    "dropoutrate": "model.dropout",
    "pdrop": "model.dropout",
    "residpdrop": "model.dropout",
    "attndropout": "model.dropout",
    "hiddendropoutprob": "model.dropout",
    "vocab": "tokenizer.vocab_size",
    "vocabsize": "tokenizer.vocab_size",
    "nvocab": "tokenizer.vocab_size",
    "tokenizerpath": "tokenizer.path",
    "data": "corpus.path",
    "datadir": "corpus.path",
    "datapath": "corpus.path",
    "trainfile": "corpus.path",
    "textpath": "corpus.path",
    "inputfile": "corpus.path",
    "dataset": "corpus.name",
    "datasetname": "corpus.name",
    "textcolumn": "corpus.field",
    "textfield": "corpus.field",
    "valfraction": "corpus.held_out",
    "validationsplit": "corpus.held_out",
    "evalinterval": "evaluate.every_steps",
    "evalevery": "evaluate.every_steps",
    "evalsteps": "evaluate.every_steps",
    "valinterval": "evaluate.every_steps",
    "evaliters": "evaluate.max_windows",
    "saveinterval": "checkpoint.every_steps",
    "saveevery": "checkpoint.every_steps",
    "savesteps": "checkpoint.every_steps",
    "ckptinterval": "checkpoint.every_steps",
    "savetotallimit": "checkpoint.keep",
    "loginterval": "metrics.every_steps",
    "logevery": "metrics.every_steps",
    "loggingsteps": "metrics.every_steps",
    "wandblog": "metrics.wandb",
    "usewandb": "metrics.wandb",
    "wandbprojectname": "metrics.wandb_project",
    "tensorboard": "metrics.tensorboard",
    "device": "backend.platform",
    "platform": "backend.platform",
    "accelerator": "backend.platform",
    "memory": "backend.memory_gb",
    "emadecay": "ema.decay",
    "temperature": "sample.temperature",
    "prompt": "sample.prompt",
    "maxtokens": "sample.max_tokens",
    "maxnewtokens": "sample.max_tokens",
    "numsamples": "sample.num_samples",
    "dp": "mesh.data",
    "tp": "mesh.tensor",
    "datasettype": "corpus.name",
}


@dataclasses.dataclass(frozen=True)
class CorpusConfig(Group):
    """Text to learn from."""

    name: str = setting("tales", "which text", choices=CORPORA)
    path: str = setting("", "file, folder or glob to read", off="the Hugging Face hub, or nothing for tales")
    field: str = setting("text", "name of the text in rows of .jsonl, .json, .csv, .tsv, .parquet and the hub")
    encoding: str = setting("", "encoding of files that are not UTF-8, as cp1252 or utf-16", off="all must be UTF-8")
    changed: str = setting("", "continue: prepare files anew that were added or changed", off="refuse them", free=True)
    hub_name: str = setting("", "dataset on the Hugging Face hub, for corpus.name=hub", off="none")
    hub_config: str = setting("", "configuration of that dataset", off="its default one")
    train_split: str = setting("train", "name of the training split on the hub")
    valid_split: str = setting("validation", "name of the valid split there", off="cut from the training split by hash")
    test_split: str = setting("test", "name of the test split there", off="cut from the training split by hash")
    held_out: float = setting(0.05, "share of documents cut by hash for valid, and again for test", below_half)
    max_train_bytes: int = setting(0, "length of the training split, in bytes of text", not_negative, off="all of it")
    num_train_tales: int = setting(20_000, "tales generated for the training split", positive, at_most(1 << 30))
    num_valid_tales: int = setting(500, "tales generated for the valid split", positive, at_most(1 << 30))
    num_test_tales: int = setting(500, "tales generated for the test split", positive, at_most(1 << 30))

    def broken(self) -> Broken:
        if self.name == "hub" and not self.hub_name:
            yield "hub_name", "name a dataset when corpus.name=hub", "try ag_news"
        if self.name == "hub" and not self.train_split:
            yield "train_split", "name a split of the dataset", "try train"
        if self.name == "files" and not self.path.strip():
            yield "path", "name a file, folder or glob", "try --config.corpus.path=my-texts/"
        if self.encoding and not is_text_encoding(self.encoding):
            yield "encoding", "be a text encoding that Python knows", _similar_encodings(self.encoding)
        if self.changed not in ("", "continue"):
            yield "changed", 'be "" or continue', "try --config.corpus.changed=continue"


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Group):
    """How text becomes tokens."""

    vocab_size: int = setting(4096, "tokens, with bytes and special tokens", positive, at_most((1 << 31) - 1))
    path: str = setting("", "an existing SentencePiece .model to use", off="train one on the training split")
    sample_bytes: int = setting(50_000_000, "text the tokenizer is trained on, in bytes at most", positive)

    def broken(self) -> Broken:
        if self.vocab_size < MIN_VOCAB_SIZE and not self.path:
            rule = f"be at least {MIN_VOCAB_SIZE} (256 bytes, 4 special tokens, a character)"
            yield "vocab_size", rule, "try 4096"


@dataclasses.dataclass(frozen=True)
class ModelConfig(Group):
    """A decoder-only transformer, as LLaMA is."""

    num_layers: int = setting(6, "transformer blocks", positive, at_most(1024))
    embed_dim: int = setting(384, "width of the model", positive, at_most(1 << 16))
    num_heads: int = setting(6, "query heads of a block", positive, at_most(1024))
    num_kv_heads: int = setting(0, "key/value heads, shared by the query heads", not_negative, off="num_heads")
    head_dim: int = setting(0, "width of a head", not_negative, at_most(1 << 12), off="embed_dim / num_heads")
    mlp_dim: int = setting(
        0, "width of the gated MLP", not_negative, at_most(1 << 18), off="8/3 of embed_dim, up to a multiple of 64"
    )
    seq_len: int = setting(256, "context, in tokens", positive, at_most(1 << 20))
    rope_base: float = setting(10_000.0, "base of the rotary frequencies", positive)
    rope_scaling: float = setting(
        0.0, "what low rotary frequencies are divided by, as in Llama 3.1", not_negative, off="off", usual=8.0
    )
    rope_original_len: int = setting(8192, "with it: context of the model before that, in tokens", positive)
    norm_eps: float = setting(1e-5, "added to the mean square in a norm", positive)
    qk_norm: bool = setting(True, "RMS-normalise queries and keys")
    tie_embeddings: bool = setting(True, "one table for embedding and head")
    scale_embeddings: bool = setting(True, "multiply by sqrt(embed_dim), so that blocks do not outweigh them")
    zero_init_outputs: bool = setting(True, "the two output projections of each block start at zero")
    induction_init: bool = setting(False, "one head of each layer starts as what copying from earlier text needs")
    induction_match: bool = setting(False, "with it: heads above the first layer start by looking for the same token")
    dropout: float = setting(0.0, "share of activations dropped, to the nearest 1/256", below_one, off="off")
    embedding_dropout: float = setting(0.0, "share of token embeddings that a pass drops", below_one, off="off")
    mask_documents: bool = setting(False, "attention stays inside one document")
    scan_layers: bool = setting(False, "one compiled layer in a loop: compiles faster, runs a bit slower", free=True)

    def broken(self) -> Broken:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        nearest = heads * 2 * min(max(1, round(self.embed_dim / heads / 2)), (1 << 15) // heads)
        if self.embed_dim % heads and not self.head_dim:
            yield "embed_dim", f"be divisible by model.num_heads={heads}", f"try {nearest}"
        if self.embed_dim // heads % 2 and not self.head_dim:
            rule = f"give heads of an even width (it is {self.embed_dim // heads}) for rotary positions"
            yield "embed_dim", rule, f"try {nearest}"
        if self.head_dim % 2:
            yield "head_dim", "be even for rotary positions", f"try {self.head_dim + 1}"
        if kv_heads and heads % kv_heads:
            yield "num_kv_heads", f"divide model.num_heads={heads}", f"try {nearest_divisor(heads, kv_heads)}"
        if self.induction_match and not self.induction_init:
            yield "induction_match", "be False without model.induction_init", "set --config.model.induction_init=True"
        if self.induction_init and (kv_heads or heads) == 1:
            rule = "be False unless another key/value head is left for the rest"
            yield (
                "induction_init",
                rule,
                ("set --config.model.num_kv_heads=0" if heads > 1 else "set --config.model.num_heads=2"),
            )


@dataclasses.dataclass(frozen=True)
class LoraConfig(Group):
    """Low-rank updates (adapters) that are trained in the place of a base's weights."""

    rank: int = setting(0, "rank of the updates", not_negative, at_most(1 << 16), off="train all weights", usual=8)
    alpha: float = setting(16.0, "updates are multiplied by alpha / rank", positive)
    dropout: float = setting(0.0, "share of what the updates read that is dropped", below_one, off="off")
    rank_stabilized: bool = setting(False, "multiply by alpha / sqrt(rank) instead (rsLoRA)")
    dora: bool = setting(False, "also train the size of each column of a matrix (DoRA)")
    matrices: str = setting("", f"which linear layers, with commas between: {', '.join(MATRICES)}", off="all")

    def broken(self) -> Broken:
        unknown = [name for name in self.chosen if name not in MATRICES]
        if unknown or len(set(self.chosen)) < len(self.chosen):
            near = difflib.get_close_matches(unknown[0], MATRICES, n=1) if unknown else []
            remedy = f"did you mean {near[0]}?" if near else "try --config.lora.matrices=query,value"
            yield "matrices", f"name some of {', '.join(MATRICES)}, each once", remedy
        if self.dora and not self.rank:
            yield "dora", "be False where lora.rank=0", "set --config.lora.rank=8"

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names of the linear layers that have an update."""
        return tuple(name.strip() for name in self.matrices.split(",")) if self.matrices else MATRICES

    @property
    def scale(self) -> float:
        """What updates are multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Group):
    """The update of the weights: by `name` for the matrices in the blocks, by Adam for embedding, head and norms."""

    name: str = setting("adamw", "update of the matrices in the blocks", choices=OPTIMIZERS)
    learning_rate: float = setting(2e-3, "peak learning rate of the matrices in the blocks", positive, free=True)
    embedding_lr_multiplier: float = setting(3.0, "times learning_rate: that of embedding, head and norms", positive)
    beta1: float = setting(0.9, "decay of Adam's mean of gradients", below_one)
    beta2: float = setting(0.95, "decay of Adam's mean of squared gradients", below_one)
    eps: float = setting(1e-8, "added to Adam's root mean square", positive)
    momentum: float = setting(0.95, "momentum of muon", below_one)
    normuon_beta: float = setting(0.0, "of muon: decay of NorMuon's mean square per neuron", below_one, off="off")
    weight_decay: float = setting(0.1, "decay of the matrices, times the learning rate", not_negative, off="off")
    clip_norm: float = setting(1.0, "largest global norm of a gradient", not_negative, off="off")

    def broken(self) -> Broken:
        if self.normuon_beta and self.name != "muon":
            remedy = "set --config.optimizer.normuon_beta=0, or --config.optimizer.name=muon"
            yield "normuon_beta", f"be 0 where optimizer.name={self.name}", remedy


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Group):
    """What changes over a run."""

    name: str = setting("linear", "learning rate after warmup (wsd: stable, then decay)", choices=SCHEDULES)
    warmup_steps: int = setting(0, "steps until the learning rate is at its peak", not_negative, off="2 % of the run")
    final_fraction: float = setting(0.0, "learning rate at the end, as a fraction of the peak", share)
    decay_fraction: float = setting(0.2, "share of the run that wsd decays over", above_zero_share)
    short_seq_fraction: float = setting(0.0, "share of the run, its first, with short windows", share, off="off")
    seq_len_divisor: int = setting(2, "short windows that each window is then cut into", positive, at_most(1 << 20))


@dataclasses.dataclass(frozen=True)
class EmaConfig(Group):
    """An exponential moving average of the weights, which validation and samples use."""

    decay: float = setting(0.0, "share of the average that a step keeps", below_one, off="off", usual=0.999)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Group):
    """Scores on the valid split while training."""

    every_steps: int = setting(200, "steps between evaluations", not_negative, off="only at the end")
    max_windows: int = setting(128, "windows of the valid split to score", not_negative, off="all")
    batch_size: int = setting(0, "windows scored at once", not_negative, at_most(1 << 20), off="micro_batch_size")


@dataclasses.dataclass(frozen=True)
class SampleConfig(Group):
    """Text that the model writes while training."""

    every_steps: int = setting(0, "steps between samples", not_negative, off="as often as evaluation")
    prompt: str = setting("", "how each sample begins", off="start of a document")
    num_samples: int = setting(2, "samples each time", positive, at_most(1 << 20))
    max_tokens: int = setting(120, "length of a sample, in tokens at most", positive, at_most(1 << 20))
    temperature: float = setting(0.7, "what logits are divided by", not_negative, off="always the likeliest token")

    def broken(self) -> Broken:
        remedy = 'set --config.sample.prompt="" to start documents'
        if self.prompt and not self.prompt.strip():
            yield "prompt", "hold more than white space", remedy
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):
            yield "prompt", "be text (half a surrogate pair is none)", remedy


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Group):
    """What is saved, so that a run can go on."""

    every_steps: int = setting(200, "steps between checkpoints", not_negative, off="only at the end")
    keep: int = setting(2, "newest checkpoints kept, besides the best by validation loss", positive)
    keep_every: int = setting(0, "steps of which each multiple's checkpoint is kept, too", not_negative, off="none")


@dataclasses.dataclass(frozen=True)
class MetricsConfig(Group):
    """What is recorded."""

    every_steps: int = setting(10, "steps between records in metrics.jsonl, each a mean over them", positive)
    tensorboard: bool = setting(False, "write workdir/tensorboard as well")
    wandb: str = setting("off", "record with Weights & Biases", choices=WANDB_MODES)
    wandb_project: str = setting("tale_jax", "name of the project there")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Group):
    """How devices share the work."""

    data: int = setting(0, "devices that share the batch", not_negative, at_most(1 << 20), off="all that is left")
    fsdp: int = setting(1, "devices that share the batch and the weights", positive, at_most(1 << 20))
    tensor: int = setting(1, "devices that share the work of a layer", positive, at_most(1 << 20))
    processes: int = setting(
        0, "processes that train together", not_negative, at_most(1 << 20), off="as many as were started"
    )


@dataclasses.dataclass(frozen=True)
class BackendConfig(Group):
    """The machine to run on."""

    platform: str = setting("auto", "kind of device", choices=PLATFORMS)
    memory_gb: float = setting(0.0, "memory to plan for, in 10^9 bytes", not_negative, off="what the device has")
    ignore_memory: bool = setting(False, "start even what the plan says cannot fit")


@dataclasses.dataclass(frozen=True)
class Config(Group):
    """A run."""

    seed: int = setting(0, "random seed of weights, data order and dropout", not_negative, at_most((1 << 31) - 1))
    total_steps: int = setting(
        0,
        "length in optimizer steps",
        not_negative,
        at_most(UNKNOWN_TOTAL_STEPS),
        off="as many as `passes` take",
        free=True,
    )
    passes: float = setting(1.0, "passes over the training windows, where total_steps is 0", free=True)
    minutes: float = setting(0.0, "time for all of a run: decides its size and length", not_negative, off="off")
    batch_size: int = setting(8, "windows in one optimizer step", positive, at_most(1 << 20))
    micro_batch_size: int = setting(
        0, "windows in one forward and backward pass", not_negative, off="batch_size, no accumulation", free=True
    )
    precision: str = setting("auto", "dtype of the computation; weights stay float32", choices=PRECISIONS)
    windows: str = setting("stream", "end wherever they are full, or begin with a document", choices=WINDOWS)
    loss_on: str = setting("assistant", "of conversations: which turns are learned", choices=LOSS_ON)
    base: str = setting("", "model to fine-tune: a workdir or a Hugging Face folder", off="train from random weights")
    on_spike: str = setting(
        "skip",
        "what a loss far above those before does: left out, ends the run, or counts",
        choices=ON_SPIKE,
        free=True,
    )
    remat: str = setting("none", "what the backward pass recomputes, by jax.checkpoint", choices=REMAT, free=True)
    corpus: CorpusConfig = group(CorpusConfig)
    tokenizer: TokenizerConfig = group(TokenizerConfig)
    model: ModelConfig = group(ModelConfig)
    lora: LoraConfig = group(LoraConfig)
    optimizer: OptimizerConfig = group(OptimizerConfig)
    schedule: ScheduleConfig = group(ScheduleConfig)
    ema: EmaConfig = group(EmaConfig)
    evaluate: EvaluateConfig = group(EvaluateConfig, free=True)
    sample: SampleConfig = group(SampleConfig, free=True)
    checkpoint: CheckpointConfig = group(CheckpointConfig, free=True)
    metrics: MetricsConfig = group(MetricsConfig, free=True)
    mesh: MeshConfig = group(MeshConfig, free=True)
    backend: BackendConfig = group(BackendConfig, free=True)

    def broken(self) -> Broken:
        batch, micro, length = self.batch_size, self.micro_batch_size, self.model.seq_len
        if not self.total_steps and self.passes <= 0:
            remedy = "try --config.passes=1.0, or set --config.total_steps=1000"
            yield "passes", "be positive when total_steps=0", remedy
        if 0 < self.total_steps < self.schedule.warmup_steps:
            yield "schedule.warmup_steps", *_warmup_rule(self.total_steps)
        if micro and batch % micro:
            yield "micro_batch_size", f"divide batch_size={batch}", f"try {nearest_divisor(batch, micro)}"
        if self.schedule.short_seq_fraction and length % self.schedule.seq_len_divisor:
            nearest = nearest_divisor(length, self.schedule.seq_len_divisor, least=min(2, length))
            yield "schedule.seq_len_divisor", f"divide model.seq_len={length}", f"try {nearest}"

    @property
    def num_micro_batches(self) -> int:
        return self.batch_size // self.micro_batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.model.seq_len

    @property
    def length_known(self) -> bool:
        """Whether `total_steps` is the length of the run."""
        return 0 < self.total_steps < UNKNOWN_TOTAL_STEPS

    @property
    def has_default_warmup(self) -> bool:
        """Whether warmup takes as long as it does where nothing is said about it."""
        return self.schedule.warmup_steps == _default_warmup(self.total_steps)

    @classmethod
    def build(cls, values: ml_collections.ConfigDict | Mapping[str, Any], overrides: Collection[str] = ()) -> "Config":
        """Builds the run from an ml_collections config or a plain mapping, checks every rule, and derives what is 0.

        Args:
          values: of every setting.
          overrides: dotted names of those that the user gave: `passes` among them decide the length, even where the
            recipe, or the run that goes on, has a number of steps.

        Raises:
          ValueError: one line with the field, its value, the rule and a remedy.
        """
        values = values.to_dict() if isinstance(values, ml_collections.ConfigDict) else values
        if "passes" in overrides and "total_steps" not in overrides and isinstance(values, Mapping):
            values = {**values, "total_steps": 0}
        config = _read(cls, values)
        parts = {f"{field.name}.": getattr(config, field.name) for field in dataclasses.fields(cls)}
        for prefix, part in {"": config, **parts}.items():
            for field, rule, remedy in part.broken() if isinstance(part, Group) else ():
                raise mistake(prefix + field, operator.attrgetter(field)(part), rule, remedy)
        return config._derived()

    def _derived(self) -> "Config":
        model = self.model
        mlp_dim = model.mlp_dim or 64 * math.ceil(model.embed_dim * 8 / 3 / 64)
        model = dataclasses.replace(
            model,
            num_kv_heads=model.num_kv_heads or model.num_heads,
            head_dim=model.head_dim or model.embed_dim // model.num_heads,
            mlp_dim=mlp_dim,
        )
        micro = self.micro_batch_size or self.batch_size
        evaluate = dataclasses.replace(self.evaluate, batch_size=self.evaluate.batch_size or micro)
        sample = dataclasses.replace(self.sample, every_steps=self.sample.every_steps or self.evaluate.every_steps)
        return dataclasses.replace(self, model=model, micro_batch_size=micro, evaluate=evaluate, sample=sample)

    def with_total_steps(self, num_windows: int = 0) -> "Config":
        """Fills in `total_steps` and `schedule.warmup_steps` from the number of training windows.

        0 windows: the text is not there yet, and a run that it decides the length of is compiled as an endless one.
        Raises ValueError, in one line, when warmup is longer than the run.
        """
        by_passes = self.passes * num_windows / self.batch_size if num_windows else UNKNOWN_TOTAL_STEPS
        total = self.total_steps or max(1, int(min(by_passes, UNKNOWN_TOTAL_STEPS)))
        warmup = self.schedule.warmup_steps or _default_warmup(total)
        if warmup > total:
            raise mistake("schedule.warmup_steps", warmup, *_warmup_rule(total))
        schedule = dataclasses.replace(self.schedule, warmup_steps=warmup)
        return dataclasses.replace(self, total_steps=total, schedule=schedule)

    def with_base(self, base: "Config", overrides: Collection[str] = ()) -> "Config":
        """The config with the model and the tokenizer of a base. Of the model `TUNABLE` may be overridden.

        Raises ValueError, in one line, for a setting in `overrides` (dotted names) that belongs to the base.
        """
        for (name, mine, _), (_, theirs, _) in zip(iter_settings(self), iter_settings(base), strict=True):
            part, _, field = name.partition(".")
            if name in overrides and part in ("model", "tokenizer") and field not in TUNABLE and mine != theirs:
                rule = f"be {format_value(theirs)}, as base={self.base} has it"
                raise mistake(name, mine, rule, f"leave out --config.{name}")
        kept = {field: getattr(self.model, field) for field in TUNABLE if f"model.{field}" in overrides}
        model = dataclasses.replace(base.model, **kept)
        return dataclasses.replace(self, model=model, tokenizer=base.tokenizer)

    def difference(self, other: "Config") -> tuple[str, Any, Any] | None:
        """What makes this another experiment than `other`, a run of known length: the first field and both values."""
        derived = {"minutes"} if self.minutes and other.minutes else set()  # others change the length alone
        if other.has_default_warmup and (not self.schedule.warmup_steps or self.has_default_warmup):
            derived.add("schedule.warmup_steps")
        for (name, mine, known), (_, theirs, _) in zip(iter_settings(self), iter_settings(other), strict=True):
            if mine != theirs and not known.free and name not in derived:
                return name, mine, theirs
        return None

    def changes(self, other: "Config") -> dict[str, list[Any]]:
        """What differs from `other`, of the settings that a run may go on with: dotted name → its value and mine."""
        pairs = zip(iter_settings(other), iter_settings(self), strict=True)
        return {name: [theirs, mine] for (name, theirs, _), (_, mine, known) in pairs if known.free and mine != theirs}

    def to_json(self) -> dict[str, Any]:
        """Every value and the format, in JSON's types; `Config.from_json` reads it, in this version and later."""
        return {"format": FORMAT} | dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any, name: str = "config") -> "Config":
        """The config of `to_json`, of any format since 1. Raises ValueError, in one line that begins with `name`."""
        values = _upgrade(values, name)
        try:
            return cls.build(values)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def to_config_dict(self) -> ml_collections.ConfigDict:
        """The settings as recipes and flags change them."""
        return ml_collections.ConfigDict(dataclasses.asdict(self))

    def save(self, workdir: Path) -> None:
        """Writes every value and a digest of them to `workdir/config.json`, whole or not at all."""
        values = self.to_json()
        text = json.dumps(values | {"digest": digest_of(values)}, indent=2, allow_nan=False)
        write_atomically(Path(workdir) / "config.json", text + "\n")

    @classmethod
    def load(cls, workdir: Path) -> "Config":
        """Reads `workdir/config.json`. Raises ValueError, in one line, where there is none or it is not sound."""
        return cls.from_json({"format": FORMAT} | read_config_json(workdir), str(Path(workdir) / "config.json"))


# Reading, changing and explaining.


def read_config_json(workdir: Path) -> dict[str, Any]:
    """The values in `workdir/config.json`, as a file of today's format has them; nothing about them is checked.

    Raises ValueError, in one line, where there is none, it is not JSON, it was changed since it was written, or its
    format cannot be read.
    """
    path = Path(workdir) / "config.json"
    repair = f"restore it (`python launch/verify.py --workdir={quoted(workdir)} --repair`)"
    if not path.is_file():
        trained = (path.parent / "checkpoints").is_dir()  # whose manifests have the settings
        remedy = repair if trained else "give the folder that launch/train.py wrote"
        raise ValueError(f"workdir={workdir} must hold an experiment (no config.json there); {remedy}")
    check_entries(Path(workdir))
    check_inside(Path(workdir), path, MAX_BYTES)
    remedy = f"{repair}, or train in a new workdir"
    values = json_object(path.read_bytes(), path, remedy)
    digest = values.pop("digest", None)
    upgraded = _upgrade(values, str(path))
    if (digest is not None or values["format"] >= FIRST_WITH_DIGEST) and not _is_digest_of(values, digest):
        raise ValueError(f"{path} is damaged, or was changed by hand; {remedy}")
    return upgraded


def _is_digest_of(values: Any, digest: Any) -> bool:
    try:
        return digest_of(values) == digest
    except (ValueError, RecursionError):
        return False


def _upgrade(values: Any, name: str) -> dict[str, Any]:
    """The values of a saved config as today's format has them, without the format."""
    if not isinstance(values, dict) or "format" not in values:
        remedy = "train again in a new workdir, or use the version that wrote it"
        raise ValueError(f"{name} was written by an older tale_jax (before format 1); {remedy}")
    number = values["format"]
    if type(number) is not int or not 1 <= number <= FORMAT:
        remedy = "update tale_jax if a newer one wrote the file, otherwise restore it"
        raise ValueError(f"{name}: format={format_value(number)} must be a number from 1 to {FORMAT}; {remedy}")
    values = {key: value for key, value in values.items() if key != "format"}
    for older in range(number, FORMAT):
        values = UPGRADES[older](values)
    return values


def change(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with some settings, by dotted name, changed."""
    values: Any = dataclasses.asdict(config)
    for name, value in settings.items():
        *groups, last = name.split(".")
        functools.reduce(operator.getitem, groups, values)[last] = value
    if "micro_batch_size" in settings:
        values["evaluate"]["batch_size"] = settings["micro_batch_size"]
    return Config.build(values)


def leaves(config: Group) -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted name, value), in the order of declaration."""
    return ((name, value) for name, value, _ in iter_settings(config))


def settings() -> dict[str, Setting]:
    """What is known of every setting, by dotted name, in the order of declaration."""
    return {name: known for name, _, known in iter_settings(Config())}


def advice(name: str, prefix: str = "") -> str:
    """What to write in place of a dotted name that is no setting; `prefix` (of a flag) goes before a name it gives."""
    if name in RENAMED:
        return f"it is now {prefix}{RENAMED[name]}"
    if name in REMOVED:
        return "it was removed; leave it out"
    first, _, last = name.rpartition(".")
    names = list(settings())
    if meant := setting_meant_by(name):
        return f"did you mean {prefix}{meant}?"
    same = [known for known in names if known.rpartition(".")[2] == last]
    if near := difflib.get_close_matches(name, same or names, n=1, cutoff=0.0 if same else 0.7):
        return f"did you mean {prefix}{near[0]}?"
    inside = [known.removeprefix(f"{first}.") for known in names if known.startswith(f"{first}.")]
    return f"{first} has {', '.join(inside)}" if inside else "see `settings` in tale_jax/config.py"


def setting_meant_by(name: str) -> str:
    """The setting that a name used elsewhere, such as lr or model.n-layer, stands for; "" when none is known."""
    group_name, _, last = name.replace("-", "_").lower().rpartition(".")
    names = list(settings())
    meant = COMMON_NAMES.get(last.replace("_", ""), "")
    inside = [known.rpartition(".")[2] for known in names if known.rpartition(".")[0] == group_name]
    if group_name and (wanted := meant.rpartition(".")[2]) in inside:
        return f"{group_name}.{wanted}"
    if group_name and (near := difflib.get_close_matches(last, inside, n=1, cutoff=0.62)):
        return f"{group_name}.{near[0]}"
    same = [known for known in names if known.rpartition(".")[2] == last]
    return last if last in names else meant or (same[0] if len(same) == 1 else "")


def _read(kind: Any, values: Any, prefix: str = "") -> Any:
    """A group made of `values`, each of them right by itself."""
    if not isinstance(values, Mapping):
        raise mistake(prefix.rstrip(".") or "config", values, "be a group of settings", "set one of those in it")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            name = format_value(f"{prefix}{key}").strip("'\"")
            raise ValueError(f"{name} is not a setting of tale_jax; {advice(name)}")
    built = {}
    for key, field in fields.items():
        name = prefix + key
        if key not in values:
            raise ValueError(f"{name} is missing from the config; add it (configs/base.py has every setting)")
        known = field.metadata.get("setting")
        built[key] = known.read(name, values[key]) if known else _read(field.type, values[key], f"{name}.")
    return kind(**built)


def is_text_encoding(name: str) -> bool:
    """Whether Python turns bytes into text by that name."""
    try:
        return codecs.lookup(name)._is_text_encoding and "a".encode(name).decode(name) == "a"
    except (LookupError, ValueError):  # a name may hold any character
        return False


def _similar_encodings(name: str) -> str:
    """What to write in place of a name that is no text encoding."""
    known = {alias.replace("_", "-") for pair in encodings.aliases.aliases.items() for alias in pair}
    near = difflib.get_close_matches(name.lower().replace("_", "-"), sorted(filter(is_text_encoding, known)))
    return f"did you mean {' or '.join(near)}?" if near else "try cp1252 or utf-16"


def _warmup_rule(total_steps: int) -> tuple[str, str]:
    return f"not exceed total_steps={total_steps}", "try --config.schedule.warmup_steps=0 (2 % of the run)"


def _default_warmup(total_steps: int) -> int:
    return math.ceil(WARMUP_SHARE * total_steps)
