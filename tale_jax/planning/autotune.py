"""From minutes to settings: vocabulary, size, length and regularisation of a run, each with its reason.

    python launch/train.py --config=configs/files.py --config.corpus.path=my-texts/ --config.minutes=30 --workdir=…

A large model sees little text in the time, a small one learns little from much. So each size of a ladder is asked how
often it could read the text, and a law of losses which of them then ends lowest: Hoffmann et al. 2022, with what
Muennighoff et al. 2023 found text to be worth that is read again. Speeds come from a few real steps: of the size that
looks best, until the one that looks best was measured.
"""

import dataclasses
import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from tale_jax.config import Config, change, leaves
from tale_jax.data.prepare import Prepared, prepare, with_vocab_size
from tale_jax.hardware.backend import Backend, matmul_peak
from tale_jax.model.transformer import flops_per_token
from tale_jax.planning.memory import measure_memory, memory_budget
from tale_jax.planning.numerics import choose_precision
from tale_jax.planning.plan import format_duration, time_steps
from tale_jax.planning.programs import Untrained
from tale_jax.training.step import make_trainer
from tale_jax.utils.progress import Progress

SHAPES = ((4, 128), (5, 192), (6, 256), (6, 320), (6, 384), (8, 512), (10, 640), (12, 768))  # layers and width
HEAD_DIM = 64

# Bits per byte of held-out text after training N million weights on D megabytes: FLOOR + SIZE / N ** SIZE_POWER +
# TEXT / D ** TEXT_POWER. Fitted to four runs of this recipe on children's books, of 1.1 and 5.3 million weights and 1.3
# to 4.1 megabytes (off by 0.02 at most), with powers near those published. Another text has another floor, which
# changes no choice.
FLOOR, SIZE, SIZE_POWER, TEXT, TEXT_POWER = 0.93, 0.25, 0.34, 0.87, 0.3
# Text that is read again is worth less and less: after about so many passes more, nearly nothing. Muennighoff et al.
# 2023 found 15 for larger models and texts; ours, with ten weights for a token of text, memorise it sooner.
REPEATS = 5.0

# Passes up to which text bears so much dropout and weight decay. In 7 passes over 0.23 MB a model of 1.0 million
# weights came to 2.24 bits/byte without dropout (and 1.11 on the text itself), to 2.10 with the third row.
REGULARISATION = ((2, 0.0, 0.1), (5, 0.1, 0.2), (12, 0.2, 0.4), (math.inf, 0.3, 0.4))

# What is not a step, measured: programs besides the step take OTHER_PROGRAMS times as long to compile as it; to score a
# token takes SCORING of what to train on it takes. A checkpoint takes SAVING seconds a weight; START is all the rest.
OTHER_PROGRAMS, SCORING, SAVING, START = 1.2, 0.45, 5e-8, 3.0
MARGIN = 0.03  # of the time for steps
SHARE, COMPILING = 0.7, 5.0  # of the peak of matrix products that a step reaches, and seconds, before any was measured
NARROW = 400.0  # width at which products take as long as all else that is done for a token
MUON_FLOPS = 17.0  # FLOPs of an update for each weight of the blocks and unit of width: five rounds of Newton-Schulz
MIN_STEPS = 50
TRIALS = 3  # sizes measured, at most

SIZES = tuple(f"model.{name}" for name in ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim"))
CHOSEN = (
    "total_steps",
    "tokenizer.vocab_size",
    *SIZES,
    "model.dropout",
    "optimizer.weight_decay",
    "evaluate.every_steps",
    "sample.every_steps",
    "checkpoint.every_steps",
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A run that fits into the time, and what it is expected to reach.

    Attributes:
      config: of the run, with `total_steps`.
      seconds: of a step; measured for the run that is chosen, otherwise scaled by the work in it.
      passes: over the training text.
      bits: predicted, per byte of held-out text.
    """

    config: Config
    seconds: float
    passes: float
    bits: float


def autotune(
    config: Config, workdir: Path, backend: Backend, start_time: float, overrides: Collection[str] = ()
) -> Config:
    """The config with what `config.minutes` decide filled in, and its text prepared; reasons are printed and logged.

    A workdir that was begun keeps what was decided then.

    Args:
      config: with `minutes` above 0.
      start_time: `time.monotonic()` when the minutes began.
      overrides: dotted names of settings that the user gave, which are left alone. A size given in part is given whole.

    Raises:
      ValueError: one line, when the time is too short to train, or the length was given as well.
    """
    if (workdir / "config.json").is_file():
        before = dict(leaves(Config.load(workdir)))
        return change(config, {name: before[name] for name in CHOSEN if name not in overrides})
    for name in ("total_steps", "passes"):
        if name in overrides:
            raise ValueError(f"{name} must not be given where minutes={config.minutes:g} decide it; leave out one")
    if jax.process_count() > 1:
        raise ValueError(f"minutes={config.minutes:g} must be 0 where several processes train; set passes instead")
    log = workdir / "log.txt"
    with Progress("budget", log=log) as progress:
        if "tokenizer.vocab_size" not in overrides:
            config, reason = with_vocab_size(config)
            progress.print(reason)
        prepared = prepare(config, workdir, log)
        best, others = find_best(config, prepared, backend, start_time + 60 * config.minutes, overrides)
        for line in explain(best, others, prepared):
            progress.print(line)
    return best.config


def find_best(
    config: Config, prepared: Prepared, backend: Backend, end: float, overrides: Collection[str] = ()
) -> tuple[Candidate, list[Candidate]]:
    """The best run that ends by `end` (of `time.monotonic()`), and those of the other sizes."""
    dtype, _ = choose_precision(backend, config.precision)
    shapes = [{}] if any(name in overrides for name in SIZES) else [_shape(*shape) for shape in SHAPES]
    sizes = [change(config, shape) for shape in shapes]
    guess = SHARE * matmul_peak(dtype) * len(backend.devices)
    measured: dict[int, tuple[float, float]] = {}  # place in `sizes` → seconds of a step, and of compiling it
    while True:
        left, runs = end - time.monotonic(), []
        for i, size in enumerate(sizes):
            known = min(measured, key=lambda j: abs(i - j), default=None)
            seconds, compiling = (step_flops(size) / guess, COMPILING) if known is None else measured[known]
            seconds *= 1 if known is None else step_flops(size) / step_flops(sizes[known])
            runs.append(make_candidate(size, count_steps(size, left, seconds, compiling), seconds, prepared, overrides))
        choice = measured if len(measured) == TRIALS else range(len(runs))
        best = min(choice, key=lambda i: runs[i].bits)
        if best in measured:
            break
        found = _measure(runs[best].config, backend, dtype)
        if found is None and best:  # it does not fit into memory, and so does none that is larger
            del sizes[best:]
        else:
            measured[best] = found or (runs[best].seconds, COMPILING)  # `train` will say what would make it fit
    if runs[best].config.total_steps < MIN_STEPS:
        spent = 60 * config.minutes - left
        raise ValueError(
            f"minutes={config.minutes:g} must leave time to train, but {spent:.0f} s went into preparing; "
            f"try minutes={math.ceil(spent / 15)}"
        )
    return runs[best], [run for i, run in enumerate(runs) if i != best]


def predict(parameters: float, read: float, text: float) -> float:
    """Bits per byte that so many weights end at, after reading `read` bytes of a text of `text` bytes."""
    again = max(0.0, read / text - 1)
    worth = min(read, text) + text * REPEATS * (1 - math.exp(-again / REPEATS))
    return FLOOR + SIZE / (parameters / 1e6) ** SIZE_POWER + TEXT / (worth / 1e6) ** TEXT_POWER


def regularisation(passes: float) -> tuple[float, float]:
    """Dropout and weight decay for a text that is read so often."""
    return next((dropout, decay) for most, dropout, decay in REGULARISATION if passes <= most)


def num_stops(minutes: float) -> int:
    """How often a run stops to be scored, sampled and saved: about every two minutes."""
    return min(max(round(minutes / 2), 3), 10)


def count_steps(config: Config, left: float, seconds: float, compiling: float) -> int:
    """How many steps of `seconds` fit into `left` seconds, beside all that is not a step; 0 when none does."""
    scored = config.evaluate.max_windows * config.model.seq_len / config.tokens_per_step
    besides = START + (1 + OTHER_PROGRAMS) * compiling
    besides += num_stops(config.minutes) * (SCORING * scored * seconds + SAVING * num_parameters(config))
    return max(0, int((left - besides) / (seconds * (1 + MARGIN))))


def make_candidate(
    config: Config, steps: int, seconds: float, prepared: Prepared, overrides: Collection[str] = ()
) -> Candidate:
    """A run of so many steps of `seconds`, with all that follows from its length."""
    text = prepared.manifests["train"]
    passes = steps * config.tokens_per_step / text.tokens
    dropout, decay = regularisation(passes)
    every = max(1, math.ceil(steps / num_stops(config.minutes)))
    settings = {
        "total_steps": steps,
        "model.dropout": dropout,
        "optimizer.weight_decay": decay,
        "evaluate.every_steps": every,
        "sample.every_steps": every,
        "checkpoint.every_steps": every,
    }
    config = change(config, {name: value for name, value in settings.items() if name not in overrides})
    bits = predict(num_parameters(config), passes * text.bytes, text.bytes) if steps else math.inf
    return Candidate(config, seconds, passes, bits)


def num_parameters(config: Config) -> int:
    """Weights that a token is multiplied with: those of the blocks and of the head."""
    return flops_per_token(dataclasses.replace(config.model, seq_len=0), config.tokenizer.vocab_size) // 6


def step_flops(config: Config) -> float:
    """What a step takes, in FLOPs of large products: its own, those of Muon's update, and what narrow models add."""
    width, vocabulary = config.model.embed_dim, config.tokenizer.vocab_size
    flops = flops_per_token(config.model, vocabulary) * config.tokens_per_step
    if config.optimizer.name == "muon":  # with small batches a large part of the whole
        flops += MUON_FLOPS * (num_parameters(config) - vocabulary * width) * width
    return flops * (1 + NARROW / width)


def explain(best: Candidate, others: list[Candidate], prepared: Prepared) -> list[str]:
    """What was chosen and why, a line for each choice."""
    config, text = best.config, prepared.manifests["train"]
    tokens, speed = config.total_steps * config.tokens_per_step, config.tokens_per_step / best.seconds

    def size(run: Candidate) -> str:
        return f"{num_parameters(run.config) / 1e6:.1f}M"

    near = sorted(others, key=lambda run: abs(math.log(num_parameters(run.config) / num_parameters(config))))[:2]
    than = "".join(
        f"; {size(run)} would make {run.passes:.1f} passes, to {run.bits:.3f}"
        for run in sorted(near, key=lambda run: num_parameters(run.config))
        if math.isfinite(run.bits)
    )
    return [
        f"{size(best)} parameters, {config.model.num_layers} layers of {config.model.embed_dim}: {speed:,.0f} tokens/s "
        f"measured, {tokens / 1e6:.1f}M tokens in {format_duration(tokens / speed)}, {best.passes:.1f} passes, "
        f"predicted {best.bits:.3f} bits/byte{than}",
        f"dropout {config.model.dropout:g}, weight decay {config.optimizer.weight_decay:g}: what suits "
        f"{best.passes:.1f} passes over {text.tokens:,} tokens",
    ]


def _shape(num_layers: int, embed_dim: int) -> dict[str, Any]:
    return dict(zip(SIZES, (num_layers, embed_dim, embed_dim // HEAD_DIM, 0, 0), strict=True))


def _measure(config: Config, backend: Backend, dtype: Any) -> tuple[float, float] | None:
    """Seconds of a step, and of compiling it; None where the run does not fit into memory."""
    config, start_time = config.with_total_steps(), time.monotonic()
    trainer = make_trainer(config, backend, dtype, Untrained.bos_id)
    compiled = trainer.compile()
    peak, most = measure_memory(config, trainer, compiled, backend).peak, memory_budget(config, backend)
    compiling = time.monotonic() - start_time
    if most and peak > most and not config.backend.ignore_memory:
        return None
    return time_steps(config, trainer), compiling
