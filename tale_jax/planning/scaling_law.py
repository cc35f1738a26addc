"""A law of losses: what a model of so many weights reaches after so much text, and how well that is known.

    laws = Bootstrap(rungs)                             # of a few small runs
    laws.predict(5_300_000, 4e6, 4.5e6)                 # 1.49 bits/byte, between 1.47 and 1.51

The form is that of Hoffmann et al. 2022. A handful of runs does not determine six numbers, so each starts from what
was found on another text (`scaling_law.json`), and moves as far as such numbers differ between texts (`SPREADS`);
powers differ little. The interval comes from a bootstrap: the rungs are drawn again, with noise, and so is what the
numbers start from. Of a text whose entropy is known, as that of the tales, that is the floor.

A ladder of runs on a text leaves its law in the user's cache folder, where `known_law` finds it for that text.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tale_jax.hardware.machine import cache_folder
from tale_jax.utils.files import json_object, write_atomically
from tale_jax.utils.manifests import digest_of

DRAWS = 200  # of the bootstrap
NOISE = 0.004  # relative deviation of a run's loss, between seeds: three runs of 1.6 bits/byte differ by 0.002 to 0.006
INTERVAL = (0.025, 0.975)


@dataclasses.dataclass(frozen=True)
class LossLaw:
    """Bits per byte of held-out text after training N million weights on D megabytes of text:

        floor + size / N ** size_power + text / D ** text_power

    Text that is read again is worth less and less (Muennighoff et al. 2023): after about `repeats` passes more, nearly
    nothing. They found 15 for larger models and texts; ours, with ten weights for a token of text, memorise it sooner.
    """

    floor: float
    size: float
    size_power: float
    text: float
    text_power: float
    repeats: float

    def predict(self, num_weights: float | int, read_bytes: float | int, text_bytes: float | int) -> float:
        """Bits per byte after reading `read_bytes` of a text of `text_bytes`, which repeats where it is shorter."""
        repeats = max(0.0, read_bytes / text_bytes - 1)
        worth = min(read_bytes, text_bytes) + text_bytes * self.repeats * (1 - math.exp(-repeats / self.repeats))
        size_term = self.size / (num_weights / 1e6) ** self.size_power
        return self.floor + size_term + self.text / (worth / 1e6) ** self.text_power


# By how much each number differs between texts: the standard deviation of its logarithm.
SPREADS = LossLaw(floor=0.4, size=0.7, size_power=0.15, text=0.5, text_power=0.15, repeats=0.5)


class Rung(NamedTuple):
    """A run that a law is fitted to: `read_bytes` of a text of `text_bytes` were read, some of them again."""

    num_weights: float
    read_bytes: float
    text_bytes: float
    bits_per_byte: float


class Prediction(NamedTuple):
    """Bits per byte, and the ends of the interval in which 95 of 100 runs are expected."""

    bits_per_byte: float
    lower: float
    upper: float


def fit(rungs: Sequence[Rung], start: LossLaw, noise: float = NOISE, entropy: float = 0.0) -> LossLaw:
    """The law that fits the runs best, as far as they say something: the rest stays near `start`.

    Args:
      rungs: at least one.
      start: what the numbers stay near of which the runs say nothing.
      noise: relative deviation of a run's loss from any law.
      entropy: bits per byte that no run can come below, which is then the floor; 0: not known.
    """
    from scipy.optimize import least_squares  # takes a while to import

    known = [math.log(entropy)] if entropy else []
    center, spreads = _logs(start)[len(known) :], _spreads()[len(known) :]
    measured = np.log([rung.bits_per_byte for rung in rungs])

    def deviations(logs: Float[np.ndarray, " F"]) -> Float[np.ndarray, " deviations"]:
        law = _law([*known, *logs])
        predicted = np.log([law.predict(*rung[:3]) for rung in rungs])
        return np.concatenate([(predicted - measured) / noise, (logs - center) / spreads])

    return _law([*known, *least_squares(deviations, center).x])


def residuals(law: LossLaw, rungs: Sequence[Rung]) -> Float[np.ndarray, " N"]:
    """Measured over predicted loss of each run, less 1."""
    return np.array([rung.bits_per_byte / law.predict(*rung[:3]) - 1 for rung in rungs])


class Bootstrap:
    """Laws that might be, given some runs: the best one, and those of runs drawn again.

    Args:
      rungs: at least one.
      draws: how many.
      entropy: of the text, in bits per byte, where it is known; 0: it is not.

    Attributes:
      law: the best.
      noise: relative deviation of the runs from it; at least `NOISE`.
    """

    def __init__(self, rungs: Sequence[Rung], draws: int = DRAWS, entropy: float = 0.0):
        start, self._entropy = default_law().law, entropy
        self.law = fit(rungs, start, entropy=entropy)
        self.noise = max(NOISE, float(np.sqrt(np.mean(residuals(self.law, rungs) ** 2))))
        rng = np.random.default_rng(0)
        center, spreads = _logs(start), _spreads()
        self._laws = []
        for _ in range(draws):
            near = _law(center + spreads * rng.standard_normal(len(center)))
            chosen = [rungs[i] for i in rng.integers(len(rungs), size=len(rungs))]
            factors = np.exp(self.noise * rng.standard_normal(len(rungs)))
            drawn = [r._replace(bits_per_byte=r.bits_per_byte * f) for r, f in zip(chosen, factors, strict=True)]
            self._laws.append(fit(drawn, near, entropy=entropy))
        self._run_noise = np.exp(self.noise * rng.standard_normal(draws))

    def predict(self, num_weights: float | int, read_bytes: float | int, text_bytes: float | int) -> Prediction:
        """What a run will reach, as `LossLaw.predict`, and the interval of it."""
        best = self.law.predict(num_weights, read_bytes, text_bytes)
        drawn = self._run_noise * [law.predict(num_weights, read_bytes, text_bytes) for law in self._laws]
        lower, upper = np.quantile(np.maximum(drawn, self._entropy), INTERVAL)
        return Prediction(best, float(min(lower, best)), float(max(upper, best)))


class KnownLaw(NamedTuple):
    """A law and the runs that it was fitted to, on the text that `source` names."""

    law: LossLaw
    rungs: tuple[Rung, ...]
    source: str


def save_law(path: Path, known: KnownLaw) -> None:
    """Writes a law and its runs as JSON, with what is left over of each."""
    left = residuals(known.law, known.rungs)
    rows = [rung._asdict() | {"residual": round(float(r), 5)} for rung, r in zip(known.rungs, left, strict=True)]
    values = {"source": known.source, "law": dataclasses.asdict(known.law), "rungs": rows}
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def read_law(path: Path) -> KnownLaw:
    """The law of a file. Raises ValueError, in one line, for a file that has none."""
    values = json_object(path.read_bytes(), path, "remove it")
    try:
        law = LossLaw(**{name: float(value) for name, value in values["law"].items()})
        rungs = tuple(Rung(*(float(row[name]) for name in Rung._fields)) for row in values["rungs"])
        if not all(math.isfinite(x) and x > 0 for x in dataclasses.astuple(law)):
            raise ValueError
        return KnownLaw(law, rungs, str(values["source"]))
    except (TypeError, KeyError, AttributeError, ValueError):
        raise ValueError(f"{path} must hold a law of losses; remove it") from None


@functools.cache
def default_law() -> KnownLaw:
    """That of a text about which nothing is known."""
    return read_law(Path(__file__).with_suffix(".json"))


def known_law(corpus: Mapping[str, Any]) -> KnownLaw:
    """The law that a ladder found for a corpus (`Manifest.corpus`) on this machine, else `default_law`."""
    path = law_file(corpus)
    with contextlib.suppress(OSError, ValueError):  # the cache is optional
        if path is not None:
            return read_law(path)
    return default_law()


def law_file(corpus: Mapping[str, Any]) -> Path | None:
    """Where the law of a corpus is kept; None where this user has no cache folder."""
    folder = cache_folder()
    identity = {name: value for name, value in corpus.items() if name != "path"}  # the contents have a digest
    return None if folder is None else folder / "laws" / f"{digest_of(identity)[:32]}.json"


def _logs(law: LossLaw) -> Float[np.ndarray, " 6"]:
    return np.log(dataclasses.astuple(law))


def _spreads() -> Float[np.ndarray, " 6"]:
    return np.array(dataclasses.astuple(SPREADS))


def _law(logs: Sequence[float] | Float[np.ndarray, " 6"]) -> LossLaw:
    return LossLaw(*(float(value) for value in np.exp(np.clip(logs, -30, 30))))
