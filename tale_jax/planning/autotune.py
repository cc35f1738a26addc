"""From minutes to settings: vocabulary, size, length and regularisation of a run, each with its reason.

    python launch/train.py --config=configs/files.py --config.corpus.path=my-texts/ --config.minutes=30 --workdir=…

A large model sees little text in the time, a small one learns little from much. So for each size of SHAPES it is
computed how often it could read the text, and a law of losses predicts which of them ends lowest: that of this text,
where a ladder (`runs/ladder.py`) has found one. Speeds come from a few real steps: of the size that looks best, until
the one that looks best was measured.
"""

import dataclasses
import math
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from tale_jax.config import Config, change, leaves
from tale_jax.data.prepare import Prepared, prepare, with_vocab_size
from tale_jax.hardware.backend import Backend, matmul_peak
from tale_jax.model.transformer import flops_per_token
from tale_jax.planning.memory import measure_memory, memory_budget
from tale_jax.planning.numerics import choose_precision
from tale_jax.planning.programs import UntrainedTokenizer
from tale_jax.planning.scaling_law import LossLaw, known_law
from tale_jax.planning.timing import time_steps
from tale_jax.training.step import make_trainer
from tale_jax.utils.format import format_duration
from tale_jax.utils.progress import Progress

SHAPES = ((4, 128), (5, 192), (6, 256), (6, 320), (6, 384), (8, 512), (10, 640), (12, 768))  # layers and width
HEAD_DIM = 64
MIN_STEPS = 50
MAX_MEASURED_SIZES = 3


@dataclasses.dataclass(frozen=True)
class TimeModel:
    """What a run's minutes go into, measured on two CPU cores.

    Attributes:
      startup_seconds: all that is not named below.
      other_programs: seconds to compile all programs but the step, for each second that compiling the step takes.
      scoring: time to score a token, for each second that training on it takes.
      saving_seconds_per_weight: of one checkpoint.
      margin: share of the time for steps that is kept free.
      peak_share: of the peak of matrix products that a step reaches, before any size was measured.
      compile_seconds: of the step, before any size was measured.
      narrow_width: width at which products take as long as all else that is done for a token.
      muon_flops: FLOPs of an update, for each weight of the blocks and unit of width: five rounds of Newton-Schulz.
    """

    startup_seconds: float = 3.0
    other_programs: float = 1.2
    scoring: float = 0.45
    saving_seconds_per_weight: float = 5e-8
    margin: float = 0.03
    peak_share: float = 0.7
    compile_seconds: float = 5.0
    narrow_width: float = 400.0
    muon_flops: float = 17.0


class Regularisation(NamedTuple):
    """Dropout and weight decay that suit up to `max_passes` over a text."""

    max_passes: float
    dropout: float
    weight_decay: float


TIME_MODEL = TimeModel()
# In 7 passes over 0.23 MB a model of 1.0 million weights came to 2.24 bits/byte without dropout (and 1.11 on the text
# itself), to 2.10 with the third row.
REGULARISATION = (
    Regularisation(max_passes=2, dropout=0.0, weight_decay=0.1),
    Regularisation(max_passes=5, dropout=0.1, weight_decay=0.2),
    Regularisation(max_passes=12, dropout=0.2, weight_decay=0.4),
    Regularisation(max_passes=math.inf, dropout=0.3, weight_decay=0.4),
)

_SHAPE = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
SHAPE_SETTINGS = tuple(f"model.{name}" for name in _SHAPE)
CHOSEN_SETTINGS = (
    "total_steps",
    "tokenizer.vocab_size",
    *SHAPE_SETTINGS,
    "optimizer.learning_rate",
    "model.dropout",
    "optimizer.weight_decay",
    "evaluate.every_steps",
    "sample.every_steps",
    "checkpoint.every_steps",
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A run that fits into the time, and what it is predicted to reach.

    Attributes:
      config: of the run, with `total_steps`.
      step_seconds: measured for the run that is chosen; for the others scaled by the FLOPs of a step.
      passes: over the training text.
      bits_per_byte: of held-out text, predicted.
    """

    config: Config
    step_seconds: float
    passes: float
    bits_per_byte: float


class StepCost(NamedTuple):
    """Seconds that a training step takes, and to compile it."""

    step_seconds: float
    compile_seconds: float


def autotune(
    config: Config, workdir: Path, backend: Backend, start_time: float, overrides: Collection[str] = ()
) -> Config:
    """The config with the settings that `config.minutes` decide, and its text prepared; reasons are printed and logged.

    A workdir that holds a run keeps what was decided for it.

    Args:
      config: with `minutes` above 0.
      start_time: `time.monotonic()` when the minutes started.
      overrides: dotted names of settings that the user gave, which are left alone; a part of the model's size stands
        for all of it.

    Raises:
      ValueError: one line, when the time is too short to train, or the length was given as well.
    """
    if (workdir / "config.json").is_file():
        return with_choices(config, Config.load(workdir), overrides)
    for name in ("total_steps", "passes"):
        if name in overrides:
            raise ValueError(f"{name} must not be given where minutes={config.minutes:g} decide it; leave out one")
    if jax.process_count() > 1:
        raise ValueError(
            f"minutes={config.minutes:g} must be 0 where several processes train; set --config.passes=1 instead"
        )
    log, spent = workdir / "log.txt", {"starting": time.monotonic() - start_time}
    with Progress("autotune", log=log) as progress:
        if "tokenizer.vocab_size" not in overrides:
            with progress.part("reading the text"):
                config, reason = with_vocab_size(config, workdir)
            progress.print(reason)
        prepared = prepare(config, workdir, log)
        spent["preparing the text"] = time.monotonic() - start_time - spent["starting"]
        end_time = start_time + 60 * config.minutes
        with progress.part("compiling and timing models of several sizes"):
            best, others, note = find_best(config, prepared, backend, end_time, overrides, spent)
        for line in [*explain(best, others, prepared, overrides), *([note] if note else [])]:
            progress.print(line)
    return best.config


def with_choices(config: Config, saved: Config, overrides: Collection[str] = ()) -> Config:
    """The config with what minutes decided for the run `saved`, but for what the user gave."""
    choices = dict(leaves(saved))
    return change(config, {name: choices[name] for name in CHOSEN_SETTINGS if name not in overrides})


def find_best(
    config: Config,
    prepared: Prepared,
    backend: Backend,
    end_time: float,
    overrides: Collection[str] = (),
    spent: Mapping[str, float] = MappingProxyType({}),
    law: LossLaw | None = None,
) -> tuple[Candidate, list[Candidate], str]:
    """The best run that ends by `end_time` (of `time.monotonic()`), those of the other sizes, and a note where there is
    time for few steps only: then the smallest size is trained.

    `spent`: seconds that went into what was before, by name. `law`: of losses; None: the best known for this text.
    Raises ValueError, in one line, where no step fits.
    """
    law = law or known_law(prepared.manifests["train"].corpus).law
    begin_time = time.monotonic()
    dtype, _ = choose_precision(backend, config.precision)
    given = any(name in overrides for name in SHAPE_SETTINGS)
    sizes = [config] if given else [with_size(config, *shape, overrides) for shape in SHAPES]
    assumed_flops = TIME_MODEL.peak_share * matmul_peak(dtype) * len(backend.devices)  # per second
    measured: dict[int, StepCost] = {}  # by index into `sizes`
    while True:
        seconds_left, runs = end_time - time.monotonic(), []
        for i, size in enumerate(sizes):
            nearest = min(measured, key=lambda j: abs(i - j), default=None)
            if nearest is None:
                cost = StepCost(step_flops(size) / assumed_flops, TIME_MODEL.compile_seconds)
            else:
                work = step_flops(size) / step_flops(sizes[nearest])
                cost = StepCost(measured[nearest].step_seconds * work, measured[nearest].compile_seconds)
            num_steps = count_steps(size, seconds_left, cost)
            runs.append(make_candidate(size, num_steps, cost.step_seconds, prepared, law, overrides))
        choice = measured if len(measured) == MAX_MEASURED_SIZES else range(len(runs))
        best = min(choice, key=lambda i: runs[i].bits_per_byte)
        if best in measured:
            break
        cost = measure_cost(runs[best].config, backend, dtype)
        if cost is None and best:  # it does not fit into memory, and so does none that is larger
            del sizes[best:]
        else:
            # The smallest size is kept even where it does not fit: `train` will say what would make it fit.
            measured[best] = cost or StepCost(runs[best].step_seconds, TIME_MODEL.compile_seconds)
    note = ""
    if runs[best].config.total_steps < MIN_STEPS:
        best = 0  # the smallest, whose steps are the shortest
        seconds = 60 * config.minutes - seconds_left
        parts = {**spent, "compiling and timing": time.monotonic() - begin_time}
        told = ", ".join(f"{part:.0f} s into {name}" for name, part in parts.items() if part >= 0.5)
        went = f"{told or f'{seconds:.0f} s'} went of it before the first step"
        minutes = math.ceil(max(seconds, 60 * config.minutes) / 15)
        if runs[best].config.total_steps == 0:
            raise ValueError(
                f"minutes={config.minutes:g} must leave time to train, but {went}; try --config.minutes={minutes}"
            )
        note = f"only {runs[best].config.total_steps} steps fit into minutes={config.minutes:g}: {went}; the smallest "
        note += f"model is trained; for one that learns more use --config.minutes={minutes} in a new --workdir"
    return runs[best], [run for i, run in enumerate(runs) if i != best], note


def regularisation(passes: float | int) -> Regularisation:
    """Dropout and weight decay for so many passes over a text."""
    return next(row for row in REGULARISATION if passes <= row.max_passes)


def num_stops(minutes: float | int) -> int:
    """How often a run stops to be scored, sampled and saved: about every two minutes."""
    return min(max(round(minutes / 2), 3), 10)


def count_steps(config: Config, seconds_left: float | int, cost: StepCost) -> int:
    """How many steps fit into `seconds_left`, with all that is not a step; 0 when none does."""
    model = TIME_MODEL
    scored_steps = config.evaluate.max_windows * config.model.seq_len / config.tokens_per_step
    stop_seconds = model.scoring * scored_steps * cost.step_seconds
    stop_seconds += model.saving_seconds_per_weight * num_weights(config)
    other_seconds = model.startup_seconds + (1 + model.other_programs) * cost.compile_seconds
    other_seconds += num_stops(config.minutes) * stop_seconds
    return max(0, int((seconds_left - other_seconds) / (cost.step_seconds * (1 + model.margin))))


def make_candidate(
    config: Config,
    num_steps: int,
    step_seconds: float,
    prepared: Prepared,
    law: LossLaw,
    overrides: Collection[str] = (),
) -> Candidate:
    """A run of `num_steps`, with all settings that follow from its length."""
    text = prepared.manifests["train"]
    passes = num_steps * config.tokens_per_step / text.tokens
    every_steps = max(1, math.ceil(num_steps / num_stops(config.minutes)))
    settings = {
        "total_steps": num_steps,
        "model.dropout": regularisation(passes).dropout,
        "optimizer.weight_decay": regularisation(passes).weight_decay,
        "evaluate.every_steps": every_steps,
        "sample.every_steps": every_steps,
        "checkpoint.every_steps": every_steps,
    }
    config = change(config, {name: value for name, value in settings.items() if name not in overrides})
    bits = law.predict(num_weights(config), passes * text.bytes, text.bytes) if num_steps else math.inf
    return Candidate(config, step_seconds, passes, bits)


def num_weights(config: Config) -> int:
    """Weights that a token is multiplied with: those of the blocks and of the head."""
    return flops_per_token(dataclasses.replace(config.model, seq_len=0), config.tokenizer.vocab_size) // 6


def step_flops(config: Config) -> float:
    """The time of a step, as FLOPs of large products: its own, those of Muon's update, and what narrow models add."""
    width, vocab_size = config.model.embed_dim, config.tokenizer.vocab_size
    flops = flops_per_token(config.model, vocab_size) * config.tokens_per_step
    if config.optimizer.name == "muon":  # with small batches a large part of the whole
        flops += TIME_MODEL.muon_flops * (num_weights(config) - vocab_size * width) * width
    return flops * (1 + TIME_MODEL.narrow_width / width)


def explain(best: Candidate, others: list[Candidate], prepared: Prepared, overrides: Collection[str] = ()) -> list[str]:
    """What was chosen and why, in a few lines; nothing of settings that the user gave, `overrides`."""
    config, text = best.config, prepared.manifests["train"]
    tokens, speed = config.total_steps * config.tokens_per_step, config.tokens_per_step / best.step_seconds

    def millions(run: Candidate) -> str:
        return f"{num_weights(run.config) / 1e6:.1f}M"

    nearest = sorted(others, key=lambda run: abs(math.log(num_weights(run.config) / num_weights(config))))[:2]
    alternatives = "".join(
        f"; {millions(run)} would make {run.passes:.1f} passes, to {run.bits_per_byte:.3f}"
        for run in sorted(nearest, key=lambda run: num_weights(run.config))
        if math.isfinite(run.bits_per_byte)
    )
    width = f"the recipe's, for a width of {config.model.embed_dim}"
    passes = f"what suits {best.passes:.1f} passes over {text.tokens:,} tokens"
    reasons = {
        "optimizer.learning_rate": (f"learning rate {config.optimizer.learning_rate:g}", width),
        "model.dropout": (f"dropout {config.model.dropout:g}", passes),
        "optimizer.weight_decay": (f"weight decay {config.optimizer.weight_decay:g}", passes),
    }
    chosen: dict[str, list[str]] = {}  # by their reason
    for name, (value, reason) in reasons.items():
        if name not in overrides:
            chosen.setdefault(reason, []).append(value)
    return [
        f"{millions(best)} parameters, {config.model.num_layers} layers of {config.model.embed_dim}: {speed:,.0f} "
        f"tokens/s measured, {tokens / 1e6:.1f}M tokens in {format_duration(tokens / speed)}, {best.passes:.1f} "
        f"passes, predicted {best.bits_per_byte:.3f} bits/byte{alternatives}",
        f"by the law of losses of {known_law(text.corpus).source}",
        *(f"{', '.join(values)}: {reason}" for reason, values in chosen.items()),
    ]


def with_size(config: Config, num_layers: int, embed_dim: int, overrides: Collection[str] = ()) -> Config:
    """The recipe with a model of another size.

    Two heads at least: one may be for copying alone. The learning rate goes with 1 / width, as is right for updates
    whose elements are all of one size, which Adam's are and those of Muon here (Yang et al. 2022); so the recipe's
    suits every width, if it suits its own. `overrides`: dotted names of settings that are left alone.
    """
    shape = (num_layers, embed_dim, max(2, embed_dim // HEAD_DIM), 0, 0, 0)
    settings: dict[str, Any] = dict(zip(SHAPE_SETTINGS, shape, strict=True))
    if "optimizer.learning_rate" not in overrides:
        rate = config.optimizer.learning_rate * config.model.embed_dim / embed_dim
        settings["optimizer.learning_rate"] = float(f"{rate:.3g}")
    return change(config, settings)


def measure_cost(config: Config, backend: Backend, dtype: Any) -> StepCost | None:
    """What a step costs; None where the run does not fit into memory."""
    config, start_time = config.with_total_steps(), time.monotonic()
    trainer = make_trainer(config, backend, dtype, UntrainedTokenizer.bos_id)
    compiled = trainer.compile()
    peak, budget = measure_memory(config, trainer, compiled, backend).peak, memory_budget(config, backend)
    compile_seconds = time.monotonic() - start_time
    if budget and peak > budget and not config.backend.ignore_memory:
        return None
    return StepCost(time_steps(config, trainer), compile_seconds)
