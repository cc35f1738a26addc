"""What several runs can be compared by: losses in one unit, and what must be said about them.

A token is another piece of text to another tokenizer, so nats per token of runs with different tokenizers say nothing
beside each other. Bits per byte do, as long as the text is the same.

    unit = loss_unit(runs)
    values = [value * factor for value, factor in zip(nats_per_token, unit.factors)]
"""

import dataclasses
import json
import math
from collections.abc import Sequence

from tale_jax.runs.records import RunRecords

TOKENIZERS_NOTE = """The tokenizers of these runs differ, and nats per token of different tokens cannot be compared:
losses are drawn in bits per byte of validation text. Training losses, and the entropy, are converted by how many tokens
a byte of validation text makes."""
TEXTS_NOTE = """The validation texts of these runs differ: a lower loss, also in bits per byte, may be that of an easier
text."""


@dataclasses.dataclass(frozen=True)
class LossUnit:
    """The unit that losses of several runs are drawn in: `factors` from nats per token of each (NaN: unknown)."""

    name: str
    factors: tuple[float, ...]


def loss_unit(runs: Sequence[RunRecords]) -> LossUnit:
    """Nats per token, or bits per byte where the runs have different tokenizers."""
    if not tokenizers_differ(runs):
        return LossUnit("nats per token", (1.0,) * len(runs))
    return LossUnit("bits per byte", tuple(_bits_per_byte_of_a_nat(run) for run in runs))


def comparison_notes(runs: Sequence[RunRecords]) -> list[str]:
    """What a reader of several runs must know, in sentences."""
    notes = [TOKENIZERS_NOTE] if tokenizers_differ(runs) else []
    notes += [TEXTS_NOTE] if valid_texts_differ(runs) else []
    notes = [" ".join(note.split()) for note in notes]
    if unknown := [run.name for run, factor in zip(runs, loss_unit(runs).factors, strict=True) if math.isnan(factor)]:
        notes.append(f"Not drawn: the losses of {', '.join(unknown)}, of which no bits per byte are known.")
    return notes


def tokenizers_differ(runs: Sequence[RunRecords]) -> bool:
    """Whether not all runs have the same tokenizer, as far as their workdirs tell: by its file, else its settings."""
    files = {run.manifests.get("valid", {}).get("tokenizer") for run in runs}
    if files and None not in files:
        return len(files) > 1
    settings = [run.config.get("tokenizer") for run in runs]
    return None not in settings and len({json.dumps(each, sort_keys=True) for each in settings}) > 1


def valid_texts_differ(runs: Sequence[RunRecords]) -> bool:
    """Whether not all runs are validated on the same text, as far as its length tells."""
    manifests = [run.manifests.get("valid") for run in runs]
    return len({(m["bytes"], m["words"]) for m in manifests if m and {"bytes", "words"} <= m.keys()}) > 1


def _bits_per_byte_of_a_nat(run: RunRecords) -> float:
    """Bits per byte of validation text for a nat per token of it; NaN where that is unknown."""
    for record in reversed(run.records.get("valid", ())):
        if record.get("nats_per_token") and record.get("bits_per_byte"):
            return record["bits_per_byte"] / record["nats_per_token"]
    manifest = run.manifests.get("valid", {})
    if manifest.get("bytes") and manifest.get("tokens"):
        return (manifest["tokens"] - manifest.get("documents", 0)) / manifest["bytes"] / math.log(2)
    return math.nan
