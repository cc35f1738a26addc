"""What a run is: frozen dataclasses, built once from an `ml_collections` config, and every rule they must satisfy.

The keys, their units and their off values stand in `configs/base.py`; here are their types. `Config.build` is called
before anything else happens, so that a mistake costs a second and not an hour. Nothing downstream reads a setting with
a default of its own: what is derived from other settings is derived here.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

CORPORA = ("tales", "wikitext2", "wikitext103", "tinystories", "files", "hub")
PLATFORMS = ("auto", "cpu", "metal", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("linear", "cosine", "wsd")
REMAT = (
    "none",
    "block",
    "nothing_saveable",
    "everything_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)
WANDB_MODES = ("off", "offline", "online")
WINDOWS = ("stream", "document")
OPTIMIZERS = ("adamw", "muon", "lion")
DECAY_SCHEDULES = ("rate", "constant")
# Settings younger than the first workdirs, and what those were trained with.
YOUNGER = {
    "minutes": 0.0,
    "model": {"induction_init": False, "induction_match": False, "word_dropout": 0.0},
    "optimizer": {
        "momentum": 0.95,
        "momentum_warmup_steps": 0,
        "neuron_beta": 0.0,
        "embedding_decay": 0.0,
        "decay_schedule": "rate",
        "cautious": False,
    },
    "schedule": {"short_fraction": 0.0, "short_cut": 2, "small_fraction": 0.0, "small_divisor": 2},
    "average": {"decay": 0.0},
    "backend": {"memory_gb": 0.0, "ignore_memory": False},
}

# Settings that may change when a run goes on: none of them changes what is learned (total_steps only how long).
FREE_TO_CHANGE = (
    "total_steps",
    "passes",
    "micro_batch_size",
    "remat",
    "model.scan_layers",
    "evaluate.",
    "sample.",
    "checkpoint.",
    "metrics.",
    "mesh.",
    "backend.",
)


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    name: str
    path: str
    field: str
    hub_name: str
    hub_config: str
    train_split: str
    valid_split: str
    test_split: str
    held_out: float
    max_train_bytes: int
    num_train_tales: int
    num_valid_tales: int
    num_test_tales: int


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    vocab_size: int
    path: str
    sample_bytes: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    seq_len: int
    rope_base: float
    norm_eps: float
    qk_norm: bool
    tie_embeddings: bool
    scale_embeddings: bool
    zero_init_outputs: bool
    induction_init: bool
    induction_match: bool
    dropout: float
    word_dropout: float
    logit_softcap: float
    mask_documents: bool
    scan_layers: bool

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str
    learning_rate: float
    embedding_rate: float
    beta1: float
    beta2: float
    eps: float
    momentum: float
    momentum_warmup_steps: int
    neuron_beta: float
    weight_decay: float
    embedding_decay: float
    decay_schedule: str
    cautious: bool
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    name: str
    warmup_steps: int
    final_fraction: float
    decay_fraction: float
    short_fraction: float
    short_cut: int
    small_fraction: float
    small_divisor: int


@dataclasses.dataclass(frozen=True)
class AverageConfig:
    decay: float


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    every_steps: int
    max_windows: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    every_steps: int
    prompt: str
    num_samples: int
    max_tokens: int
    temperature: float


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int
    keep: int


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    every_steps: int
    tensorboard: bool
    wandb: str
    wandb_project: str


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int


@dataclasses.dataclass(frozen=True)
class BackendConfig:
    platform: str
    memory_gb: float
    ignore_memory: bool


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. Field names are the keys of `configs/base.py`, where units and off values stand."""

    seed: int
    total_steps: int
    passes: float
    minutes: float
    batch_size: int
    micro_batch_size: int
    precision: str
    windows: str
    remat: str
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    average: AverageConfig
    evaluate: EvaluateConfig
    sample: SampleConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    mesh: MeshConfig
    backend: BackendConfig

    @classmethod
    def build(cls, values: ml_collections.ConfigDict | Mapping[str, Any]) -> "Config":
        """Builds the run from an ml_collections config or a plain mapping, derives what is 0, and checks every rule.

        Raises:
          ValueError: one line with the field, its value, the rule and a remedy.
        """
        if isinstance(values, ml_collections.ConfigDict):
            values = values.to_dict()
        config = _build(cls, values, "")
        check(config)
        return _derive(config)

    @classmethod
    def load(cls, workdir: Path) -> "Config":
        """Reads `workdir/config.json`. Raises ValueError when the folder holds no experiment."""
        path = Path(workdir) / "config.json"
        if not path.is_file():
            raise ValueError(
                f"workdir={workdir} must hold an experiment (no config.json there); "
                "give the folder that launch/train.py wrote"
            )
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} must be JSON ({error}); restore it, or train in a new workdir") from None
        return cls.build(with_younger(values))

    def save(self, workdir: Path) -> None:
        """Writes every value to `workdir/config.json`, whole or not at all."""
        partial = Path(workdir) / "config.json.partial"
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        partial.replace(Path(workdir) / "config.json")

    def planned(self, num_windows: int) -> "Config":
        """Fills in what depends on the number of training windows: `total_steps` and `schedule.warmup_steps`."""
        total = self.total_steps or max(1, int(self.passes * num_windows / self.batch_size))
        warmup = self.schedule.warmup_steps or _warmup(total)
        if self.schedule.warmup_steps > total:
            raise ValueError(
                f"schedule.warmup_steps={warmup} must not exceed total_steps={total}; "
                f"try schedule.warmup_steps=0 (2 % of the run)"
            )
        return dataclasses.replace(
            self, total_steps=total, schedule=dataclasses.replace(self.schedule, warmup_steps=warmup)
        )

    def difference(self, other: "Config") -> tuple[str, Any, Any] | None:
        """What makes this another experiment than `other`, a planned run: the first field and both values, or None."""
        derived = not self.schedule.warmup_steps and other.schedule.warmup_steps == _warmup(other.total_steps)
        free = {*FREE_TO_CHANGE, "schedule.warmup_steps"} if derived else set(FREE_TO_CHANGE)
        if self.schedule.small_fraction:  # which updates were small follows from the length of the run
            free -= {"passes", "total_steps"} if self.total_steps else {"passes"}
        for (name, mine), (_, theirs) in zip(leaves(self), leaves(other), strict=True):
            if mine != theirs and not any(name == f or (f.endswith(".") and name.startswith(f)) for f in free):
                return name, mine, theirs
        return None

    @property
    def num_micro_batches(self) -> int:
        return self.batch_size // self.micro_batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.model.seq_len


def change(config: Config, settings: dict[str, Any]) -> Config:
    """The config with some settings, by dotted name, changed."""
    values: Any = dataclasses.asdict(config)
    for name, value in settings.items():
        *groups, last = name.split(".")
        place = values
        for group in groups:
            place = place[group]
        place[last] = value
    if "micro_batch_size" in settings:
        values["evaluate"]["batch_size"] = settings["micro_batch_size"]
    return Config.build(values)


def with_younger(values: Any) -> Any:
    """What a `config.json` says, and of settings younger than it what its run was trained with."""
    if not isinstance(values, dict):
        return values
    filled = YOUNGER | values
    both = (name for name, setting in YOUNGER.items() if isinstance(setting, dict) and isinstance(filled[name], dict))
    return filled | {name: YOUNGER[name] | filled[name] for name in both}


def _warmup(total_steps: int) -> int:
    return math.ceil(0.02 * total_steps)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted name, value), in the order of declaration."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    fields: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"choose from {', '.join(fields)}"
            raise ValueError(f"{prefix}{key} is not a setting of tale_jax; {hint}")
    built = {}
    for name, kind in fields.items():
        if name not in values:
            raise ValueError(f"{prefix}{name} is missing from the config; add it (configs/base.py declares every key)")
        value = values[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ValueError(f"{prefix}{name}={value!r} must be a group of settings; see configs/base.py")
            built[name] = _build(kind, value, f"{prefix}{name}.")
        else:
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind:
                raise ValueError(f"{prefix}{name}={value!r} must be of type {kind.__name__}; see configs/base.py")
            built[name] = value
    return cls(**built)


def _derive(config: Config) -> Config:
    model = config.model
    mlp_dim = model.mlp_dim or 64 * math.ceil(model.embed_dim * 8 / 3 / 64)
    model = dataclasses.replace(model, num_kv_heads=model.num_kv_heads or model.num_heads, mlp_dim=mlp_dim)
    micro = config.micro_batch_size or config.batch_size
    evaluate = dataclasses.replace(config.evaluate, batch_size=config.evaluate.batch_size or micro)
    sample = dataclasses.replace(config.sample, every_steps=config.sample.every_steps or config.evaluate.every_steps)
    return dataclasses.replace(config, model=model, micro_batch_size=micro, evaluate=evaluate, sample=sample)


def check(config: Config) -> None:
    """Holds every rule. Raises ValueError with one line: the field, its value, the rule and a remedy."""
    settings = dict(leaves(config))

    def need(holds: bool, field: str, rule: str, remedy: str) -> None:
        if not holds:
            value = settings[field]
            shown = f'"{value}"' if isinstance(value, str) else value
            raise ValueError(f"{field}={shown} must {rule}; {remedy}")

    for field, choices in {
        "precision": PRECISIONS,
        "remat": REMAT,
        "corpus.name": CORPORA,
        "schedule.name": SCHEDULES,
        "windows": WINDOWS,
        "optimizer.name": OPTIMIZERS,
        "optimizer.decay_schedule": DECAY_SCHEDULES,
        "metrics.wandb": WANDB_MODES,
        "backend.platform": PLATFORMS,
    }.items():
        near = difflib.get_close_matches(settings[field], choices, n=1)
        need(
            settings[field] in choices,
            field,
            f"be one of {', '.join(choices)}",
            f"did you mean {near[0]}?" if near else f"try {choices[0]}",
        )

    positive = (
        "batch_size model.num_layers model.embed_dim model.num_heads model.seq_len model.rope_base model.norm_eps "
        "optimizer.learning_rate optimizer.embedding_rate optimizer.eps corpus.num_train_tales corpus.num_valid_tales "
        "corpus.num_test_tales tokenizer.sample_bytes sample.num_samples sample.max_tokens metrics.every_steps "
        "checkpoint.keep mesh.fsdp schedule.short_cut schedule.small_divisor"
    )
    for field in positive.split():
        need(settings[field] > 0 and math.isfinite(settings[field]), field, "be positive", "see configs/base.py")
    not_negative = (
        "seed total_steps minutes micro_batch_size model.num_kv_heads model.mlp_dim model.logit_softcap "
        "corpus.max_train_bytes optimizer.momentum_warmup_steps optimizer.weight_decay optimizer.embedding_decay "
        "optimizer.clip_norm "
        "schedule.warmup_steps schedule.final_fraction schedule.short_fraction schedule.small_fraction "
        "evaluate.every_steps evaluate.max_windows evaluate.batch_size sample.every_steps sample.temperature "
        "checkpoint.every_steps mesh.data backend.memory_gb"
    )
    for field in not_negative.split():
        need(settings[field] >= 0 and math.isfinite(settings[field]), field, "not be negative", "0 is off or derived")
    need(config.seed < 2**31, "seed", "be below 2147483648", "try 0")
    need(
        config.total_steps > 0 or 0 < config.passes < math.inf,
        "passes",
        "be positive when total_steps=0",
        "try passes=1.0, or set total_steps",
    )
    shares = {"model.dropout": 0.0, "model.word_dropout": 0.0, "average.decay": 0.999}
    shares |= {
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.9,
        "optimizer.momentum": 0.95,
        "optimizer.neuron_beta": 0.95,
    }
    for field, usual in shares.items():
        need(0 <= settings[field] < 1, field, "be at least 0 and below 1", f"try {usual}")
    need(0 < config.corpus.held_out < 0.5, "corpus.held_out", "lie between 0 and 0.5", "try 0.05")
    need(0 < config.schedule.decay_fraction <= 1, "schedule.decay_fraction", "be above 0 and at most 1", "try 0.2")
    for field in ("schedule.final_fraction", "schedule.short_fraction", "schedule.small_fraction"):
        need(settings[field] <= 1, field, "be at most 1", "try 0.0")
    for field, whose in {"momentum_warmup_steps": "momentum", "neuron_beta": "update"}.items():
        need(
            not settings[f"optimizer.{field}"] or config.optimizer.name == "muon",
            f"optimizer.{field}",
            f"be 0 where optimizer.name={config.optimizer.name}",
            f"set optimizer.name=muon, whose {whose} it is",
        )
    need(
        300 <= config.tokenizer.vocab_size <= 2**31 - 1 or bool(config.tokenizer.path),
        "tokenizer.vocab_size",
        "be at least 300 (256 bytes, the marks, and some pieces)",
        "try 4096",
    )

    model, micro = config.model, config.micro_batch_size
    cut, length = config.schedule.short_cut, model.seq_len
    need(
        not config.schedule.short_fraction or length % cut == 0,
        "schedule.short_cut",
        f"divide model.seq_len={length}",
        f"try {min((d for d in range(2, length + 1) if length % d == 0), key=lambda d: abs(d - cut))}",
    )
    nearest = model.num_heads * max(2, round(model.embed_dim / model.num_heads / 2) * 2)
    need(
        model.embed_dim % model.num_heads == 0,
        "model.embed_dim",
        f"be divisible by model.num_heads={model.num_heads}",
        f"try {nearest}",
    )
    need(
        model.embed_dim // model.num_heads % 2 == 0,
        "model.embed_dim",
        f"give heads of an even width (it is {model.embed_dim // model.num_heads}) for rotary positions",
        f"try {nearest}",
    )
    need(
        not model.induction_init or (model.num_kv_heads or model.num_heads) > 1,
        "model.induction_init",
        "be False unless another key/value head is left for the rest",
        "set model.num_kv_heads to 2 or more",
    )
    need(
        not model.induction_match or model.induction_init,
        "model.induction_match",
        "be False without model.induction_init",
        "set model.induction_init=True",
    )
    if model.num_kv_heads:
        divisors = [d for d in range(1, model.num_heads + 1) if model.num_heads % d == 0]
        need(
            model.num_kv_heads in divisors,
            "model.num_kv_heads",
            f"divide model.num_heads={model.num_heads}",
            f"try {min(divisors, key=lambda d: abs(d - model.num_kv_heads))}",
        )
    if micro:
        divisors = [d for d in range(1, config.batch_size + 1) if config.batch_size % d == 0]
        need(
            micro in divisors,
            "micro_batch_size",
            f"divide batch_size={config.batch_size}",
            f"try {min(divisors, key=lambda d: abs(d - micro))}",
        )
    if config.schedule.small_fraction:
        batch, micro = config.batch_size, micro or config.batch_size
        divisors = [
            d for d in range(1, batch + 1) if batch % d == 0 and (batch // d < micro or batch // d % micro == 0)
        ]
        need(
            config.schedule.small_divisor in divisors,
            "schedule.small_divisor",
            f"divide batch_size={batch} into parts of whole micro-batches (of {micro}) or of less than one",
            f"try {min(divisors[1:] or divisors, key=lambda d: abs(d - config.schedule.small_divisor))}",
        )
    if config.corpus.name == "hub":
        need(bool(config.corpus.hub_name), "corpus.hub_name", "name a dataset when corpus.name=hub", "try ag_news")
        need(bool(config.corpus.train_split), "corpus.train_split", "name a split of the dataset", "try train")
    if config.corpus.name == "files":
        need(bool(config.corpus.path), "corpus.path", "name a file, folder or glob", "try corpus.path=my-texts/")
