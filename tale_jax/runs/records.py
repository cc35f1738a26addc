"""The records of a run, read from its workdir for reports: config, records, samples, evaluations.

run = read_run(Path("experiments/tales"))
steps, losses = run.column("train", "loss")
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tale_jax.config import read_config_json
from tale_jax.training.metrics import Record
from tale_jax.utils.files import check_entries, read_json_lines


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """The records of one workdir.

    Attributes:
      name: what the report calls it.
      config: the settings, {} where there is no config.json.
      records: of metrics.jsonl by kind, as `read_metrics` gives them.
      samples: texts along the training, in the order of steps.
      evaluations: results of launch/evaluate.py, in the order of time.
      manifests: what windows/SPLIT.json says of each prepared split; {} where there is none.
    """

    name: str
    config: Mapping[str, Any]
    records: Mapping[str, list[dict[str, Any]]]
    samples: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    manifests: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def latest_start(self) -> Mapping[str, Any]:
        """The "run" record of the latest start or resumption, {} when there is none."""
        return self.records.get("run", [{}])[-1]

    def column(self, kind: str, field: str) -> tuple[list[int], list[float]]:
        """Steps and values of the records that have `field`; null, written for what is not finite, becomes NaN."""
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


def read_run(workdir: Path, name: str = "") -> RunRecords:
    """Reads a run; "" names it after its folder. Raises ValueError, in one line, when there is nothing to read."""
    if not workdir.is_dir():
        raise ValueError(f"workdir={workdir} does not exist; give the folder of an experiment")
    check_entries(workdir)
    records = read_metrics(workdir)
    if not records:
        raise ValueError(f"workdir={workdir} holds no records in metrics.jsonl; train first, then report")
    config = _read_config(workdir)
    samples = _without_superseded(read_json_lines(workdir / "samples.jsonl"))
    evaluations, manifests = read_json_lines(workdir / "evaluations.jsonl"), _read_manifests(workdir)
    return RunRecords(name or workdir.resolve().name, config, records, samples, evaluations, manifests)


def _read_manifests(workdir: Path) -> dict[str, dict[str, Any]]:
    """Manifests of the splits, those that can be read: a report needs none of them."""
    manifests = {}
    for path in sorted((workdir / "windows").glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            if isinstance(values := json.loads(path.read_text()), dict):
                manifests[path.stem] = values
    return manifests


def _read_config(workdir: Path) -> dict[str, Any]:
    """The settings of a run, as today's format has them where that is possible: any run can be reported."""
    file = workdir / "config.json"
    if not file.exists():
        return {}
    try:
        return read_config_json(workdir)
    except ValueError:  # of a format that is too old or too new
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}); restore it from a copy, or remove it") from error


def _without_superseded(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples in the order of steps; of a step that was repeated after a crash, those of the last time."""
    kept: list[dict[str, Any]] = []
    for sample in samples:
        if not isinstance(sample.get("step"), int) or not isinstance(sample.get("text"), str):
            continue
        first = sample["step"] + (0 if sample.get("number") == 0 else 1)  # what the sample supersedes starts here
        while kept and kept[-1]["step"] >= first:
            kept.pop()
        kept.append(sample)
    return kept


def read_metrics(workdir: Path) -> dict[str, list[Record]]:
    """The records of `workdir/metrics.jsonl` by kind, each step once (its last record), in the order of steps.

    A "run" record at step s says that training resumed from s: records of later steps were lost in a crash, and are
    dropped.
    """
    kinds: dict[str, dict[int, Record]] = {}
    for record in read_json_lines(workdir / "metrics.jsonl"):
        kind, step = record.get("kind"), record.get("step")
        if not isinstance(kind, str) or not isinstance(step, int):
            continue
        if kind == "run":
            for other in kinds.keys() - {"run"}:
                kinds[other] = {s: kept for s, kept in kinds[other].items() if s <= step}
        kinds.setdefault(kind, {})[step] = record
    return {kind: [records[step] for step in sorted(records)] for kind, records in kinds.items()}
