"""What a workdir holds about its run, read back for reports: config, records, samples, evaluations.

run = read_run(Path("experiments/tales"))
steps, losses = run.column("train", "loss")
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tale_jax.config import with_younger
from tale_jax.metrics import read_jsonl, read_metrics


@dataclasses.dataclass(frozen=True)
class Run:
    """What stands in one workdir."""

    name: str
    config: Mapping[str, Any]
    records: Mapping[str, list[dict[str, Any]]]  # by kind, as read_metrics gives them
    samples: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def about(self) -> Mapping[str, Any]:
        """The latest "run" record, {} when there is none."""
        return self.records.get("run", [{}])[-1]

    def column(self, kind: str, field: str) -> tuple[list[int], list[float]]:
        """Steps and values of the records that have `field`; null, which stands for "not finite", is NaN."""
        rows = [record for record in self.records.get(kind, ()) if field in record]
        return [r["step"] for r in rows], [math.nan if r[field] is None else float(r[field]) for r in rows]

    def last(self, kind: str, field: str) -> float | None:
        """The latest value, None when there is none."""
        values = self.column(kind, field)[1]
        return values[-1] if values else None

    @property
    def step(self) -> int:
        """The last step that is recorded."""
        return max((record["step"] for kind in ("train", "valid") for record in self.records.get(kind, ())), default=0)


def read_run(workdir: Path, name: str = "") -> Run:
    """Reads a run, named as its folder unless told. Raises ValueError with one line when there is nothing to read."""
    if not workdir.is_dir():
        raise ValueError(f"workdir={workdir} does not exist: name the folder of an experiment")
    records = read_metrics(workdir)
    if not records:
        raise ValueError(f"workdir={workdir} holds no records in metrics.jsonl: train first, then report")
    config_file = workdir / "config.json"
    try:
        config = with_younger(json.loads(config_file.read_text())) if config_file.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{config_file} is not JSON ({error}): restore it from a copy, or remove it") from error
    samples = _without_superseded(read_jsonl(workdir / "samples.jsonl"))
    return Run(name or workdir.resolve().name, config, records, samples, read_jsonl(workdir / "evaluations.jsonl"))


def _without_superseded(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples in the order of steps: where a restarted run came by a step again, what it said then."""
    kept: list[dict[str, Any]] = []
    for sample in samples:
        if not isinstance(sample.get("step"), int) or not isinstance(sample.get("text"), str):
            continue
        while kept and (kept[-1]["step"] > sample["step"] or kept[-1] == sample):
            kept.pop()
        kept.append(sample)
    return kept
