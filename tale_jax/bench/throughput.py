"""Tokens per second of training, scoring and decoding on this machine, and the share of its matmul peak.

Measured through the very Trainer, Scorer and Sampler that the launch scripts use, on random tokens, so neither data nor
a workdir is needed. A rate is tokens over the median time of many repetitions, with its quartiles; the FLOPs behind
`peak_share` are the model's (`flops_per_token`), not those the compiler happens to need, and the peak is the best of
large matrix products in the same dtype that this machine was seen to do undisturbed (`hardware/peak.py`); where there
is none, no share is told.

    bench = Bench(config, start_backend("auto"))
    report = measure(bench, ["train", "score", "decode", "decode_16"], seconds=10)
    print(report.record()["train"]["tokens_per_second"])
"""

import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from tale_jax.config import Config
from tale_jax.data.tokenizer import Tokenizer
from tale_jax.evaluation.scoring import Scorer, Span
from tale_jax.hardware.backend import Backend
from tale_jax.hardware.machine import peak_resident_memory
from tale_jax.hardware.peak import UNKNOWN_PEAK_NOTE, matmul_peak_of_all
from tale_jax.inference.sampler import Sampler, SampleSettings
from tale_jax.model.transformer import count_parameters, flops_per_token
from tale_jax.planning.numerics import choose_precision
from tale_jax.planning.timing import NUM_SPECIAL_TOKENS, timed_step
from tale_jax.training.state import TrainState
from tale_jax.training.step import Trainer, make_trainer
from tale_jax.utils.progress import Progress

PROMPT_TOKENS, NEW_TOKENS = 16, 200  # of one generation


@dataclasses.dataclass(frozen=True)
class Timing:
    """The seconds that each repetition took."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third: half of the repetitions lie between them."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def repeat(call: Callable[[], Any], seconds: float, *, min_repetitions: int = 5, warmup: int = 2) -> Timing:
    """Times of `call`, which must wait for its result: for about `seconds`, and at least `min_repetitions` of them."""
    for _ in range(warmup):
        call()
    times: list[float] = []
    end_time = time.perf_counter() + seconds
    while len(times) < min_repetitions or time.perf_counter() < end_time:
        start_time = time.perf_counter()
        call()
        times.append(time.perf_counter() - start_time)
    return Timing(tuple(times))


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast something goes.

    Attributes:
      tokens: of one repetition.
      timing: of all repetitions.
      flops: of the model, for one token.
      peak: FLOP/s of matrix products, of all devices together; 0: unknown.
    """

    tokens: int
    timing: Timing
    flops: float | int
    peak: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.timing.median

    @property
    def peak_share(self) -> float | None:
        done = self.tokens_per_second * self.flops
        return done / max(self.peak, done) if self.peak else None  # what was seen to be done can be done

    def record(self) -> dict[str, Any]:
        """As JSON: `low` and `high` are the quartiles of tokens per second."""
        fast, slow = self.timing.quartiles
        return {
            "tokens_per_second": self.tokens_per_second,
            "low": self.tokens / slow,
            "high": self.tokens / fast,
            "peak_share": self.peak_share,
            "repetitions": len(self.timing.seconds),
        }


class NumbersTokenizer(Tokenizer):
    """Text that is the ids themselves, "17 4 9": a tokenizer for untrained models. It has no EOS, so no text ends."""

    def __init__(self, vocab_size: int):
        self.vocab_size, self.unk_id, self.bos_id, self.eos_id, self.pad_id = vocab_size, 0, 1, -1, 3
        self.token_bytes = [f"{token} ".encode() for token in range(vocab_size)]

    def encode(self, text: str) -> np.ndarray:
        return np.array(text.split(), np.int32)


class Bench:
    """A config, ready to be measured. Its programs are compiled when they are first needed.

    Args:
      config: of the run; its corpus is not read.
      backend: where it runs.
    """

    def __init__(self, config: Config, backend: Backend):
        self.config, self.backend = config.with_total_steps(), backend
        self.dtype, self.reason = choose_precision(backend, config.precision)
        self.vocab_size = config.tokenizer.vocab_size
        self.tokenizer = NumbersTokenizer(self.vocab_size)
        self.flops = flops_per_token(config.model, self.vocab_size)
        self._rng = np.random.default_rng(0)

    @functools.cached_property
    def peaks(self) -> dict[str, float]:
        """FLOP/s of large matrix products by dtype, on all devices together; 0: unknown."""
        names = {"float32", self.dtype.name} if self.backend.platform == "metal" else {"float32", "bfloat16"}
        return {name: matmul_peak_of_all(self.backend, name) for name in sorted(names)}

    @functools.cached_property
    def trainer(self) -> Trainer:
        return make_trainer(self.config, self.backend, self.dtype, self.tokenizer.bos_id)

    @functools.cached_property
    def params(self) -> Any:
        return self.trainer.init().params

    @functools.cached_property
    def sampler(self) -> Sampler:
        return Sampler(self.trainer.model, self.params, self.tokenizer, donate=self.backend.donate)

    def windows(self, batch_size: int) -> np.ndarray:
        """Random tokens [batch_size, seq_len + 1]."""
        shape = batch_size, self.config.model.seq_len + 1
        return self._rng.integers(NUM_SPECIAL_TOKENS, self.vocab_size, shape, np.int32)

    def step(self, state: TrainState) -> TrainState:
        """The state after one training step on new windows, waited for."""
        return timed_step(self.trainer, state, self.trainer.place(self.windows(self.config.batch_size)))[0]

    def rate(self, kind: str, seconds: float) -> Rate:
        """Measures one of `train`, `score`, `decode` (one stream) or `decode_N` (N streams) for about `seconds`.

        Raises ValueError, in one line, for another kind.
        """
        if streams := num_streams(kind):
            tokens, timing = self._decode(streams, seconds)
        else:
            tokens, timing = self._train(seconds) if kind == "train" else self._score(seconds)
        return Rate(tokens, timing, self.flops if kind == "train" else self.flops / 3, self.peaks[self.dtype.name])

    def _train(self, seconds: float) -> tuple[int, Timing]:
        state = self.trainer.init()

        def step() -> None:
            nonlocal state
            state = self.step(state)

        return self.config.tokens_per_step, repeat(step, seconds)

    def _score(self, seconds: float) -> tuple[int, Timing]:
        trainer, length = self.trainer, self.config.model.seq_len
        scorer = Scorer(
            trainer.model,
            self.tokenizer,
            self.config.evaluate.batch_size,
            trainer.place_same,
            trainer.batch_sharding.mesh.size,
            trainer.replicated,
        )
        num_tokens = scorer.batch_size * length
        tokens = self.windows(scorer.batch_size).reshape(-1)
        spans = [Span(start, start + 1, start + length + 1, 0) for start in range(0, num_tokens, length)]
        return num_tokens, repeat(lambda: scorer(self.params, tokens, spans), seconds)

    def _decode(self, streams: int, seconds: float) -> tuple[int, Timing]:
        """Greedy decoding after a short prompt, of at most a whole window; the time includes the prefill."""
        seq_len = self.config.model.seq_len
        prompt = " ".join(map(str, range(NUM_SPECIAL_TOKENS, NUM_SPECIAL_TOKENS + min(PROMPT_TOKENS, seq_len // 4))))
        settings = SampleSettings(max_tokens=min(NEW_TOKENS, seq_len), temperature=0.0)
        self.sampler.batch_size = max(self.sampler.batch_size, streams)

        def generate() -> None:
            self.sampler.sample(prompt, settings, num_samples=streams)

        return streams * settings.max_tokens, repeat(generate, seconds, min_repetitions=3, warmup=1)


def num_streams(kind: str) -> int:
    """N of decode_N, 1 of decode, 0 of train and score. Raises ValueError, in one line, for another kind."""
    found = re.fullmatch(r"decode(?:_([1-9][0-9]{0,5}))?", kind)
    if found is None and kind not in ("train", "score"):
        raise ValueError(
            f"--only={kind} must be train, score, decode or decode_N for N streams; try --only=train,decode_16"
        )
    return int(found[1] or 1) if found else 0


@dataclasses.dataclass(frozen=True)
class Report:
    """All measurements of one config. `matmul_peak` has those that are known; `peak_bytes` is the peak resident memory
    of the process so far."""

    device: str
    precision: str
    params: int
    flops_per_token: float | int
    matmul_peak: dict[str, float]
    rates: dict[str, Rate]
    peak_bytes: int

    def record(self) -> dict[str, Any]:
        """As JSON: `{"train": {"tokens_per_second": ..., "peak_share": ...}, "decode": {...}, ...}`."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "rates"}
        return {kind: rate.record() for kind, rate in self.rates.items()} | facts


def measure(bench: Bench, kinds: Sequence[str], seconds: float) -> Report:
    """Rates of all `kinds` (see `Bench.rate`), each measured for about `seconds`."""
    rates = {}
    with Progress("bench", total=len(kinds), unit="measurements") as progress:
        for kind in kinds:
            with progress.stage(f"compiling and measuring {kind}"):
                rates[kind] = bench.rate(kind, seconds)
    return Report(
        device=bench.backend.device,
        precision=bench.dtype.name,
        params=count_parameters(bench.params),
        flops_per_token=bench.flops,
        matmul_peak={name: peak for name, peak in bench.peaks.items() if peak},
        rates=rates,
        peak_bytes=peak_resident_memory(),
    )


def tables(records: dict[str, dict[str, Any]]) -> list[Table]:
    """Human-readable rates of one or several records, by name."""
    table = Table("", "", "tokens/s", "middle half", "of matmul peak", "peak memory", box=None, header_style="bold")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, record in records.items():
        for kind, rate in record.items():
            if isinstance(rate, dict) and "tokens_per_second" in rate:
                table.add_row(
                    name,
                    kind,
                    f"{rate['tokens_per_second']:,.0f}",
                    f"{rate['low']:,.0f} to {rate['high']:,.0f}",
                    "–" if rate["peak_share"] is None else f"{rate['peak_share']:.1%}",
                    f"{record['peak_bytes'] / 1e6:,.0f} MB",
                )
    return [table]


def describe_record(record: dict[str, Any]) -> str:
    """Config and device of a record, in one line."""
    peaks = ", ".join(f"{name} {peak / 1e9:,.0f}" for name, peak in record["matmul_peak"].items())
    known = record["precision"] in record["matmul_peak"]
    return (
        f"{record['params']:,} parameters, {record['flops_per_token'] / 1e6:.1f} MFLOP a token, "
        f"{record['precision']}; {record['device']}"
        + (f"; matrix products, GFLOP/s: {peaks}" if peaks else "")
        + ("" if known else f"; {UNKNOWN_PEAK_NOTE}")
    )
