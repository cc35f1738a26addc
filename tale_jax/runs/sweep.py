"""Many runs of one recipe that differ in a few settings, side by side in one table.

python launch/sweep.py --config=configs/tales.py --sweep=optimizer.learning_rate=1e-3,2e-3 --sweep=seed=0,1 --out=DIR

Each combination of values is a run, and has a workdir of its own, `out/runs/NAME/`, by the values in it. Trainings are
processes of their own (`launch/train.py`), which an engine starts (`engines/jobs.py`). One that fails is told and stops
no other. The same command goes on with what is missing; with more values for the same settings, the sweep grows.

`out` holds `sweep.json` (what was asked for), `text/` (what several runs read, prepared once), `results.json` and
`results.md` (the table), `report.html` (the runs compared), and `logs/NAME.txt` (what each run has said).
"""

import contextlib
import copy
import csv
import dataclasses
import functools
import itertools
import json
import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import rich.box
import rich.table

from tale_jax.config import Config, advice, leaves, settings
from tale_jax.data.prepare import link_prepared, prepare
from tale_jax.runs.engines.jobs import SCORE_FILE, End, Engine, Job, last_line, make_job
from tale_jax.runs.records import read_run
from tale_jax.runs.report import session_seconds, write_report
from tale_jax.utils.files import json_line, json_object, to_json, write_atomically
from tale_jax.utils.format import format_clock
from tale_jax.utils.locks import writer_lock
from tale_jax.utils.manifests import digest_of
from tale_jax.utils.paths import quoted
from tale_jax.utils.progress import Progress
from tale_jax.utils.settings import format_value, mistake
from tale_jax.utils.signals import StopSignals
from tale_jax.utils.streams import say, table_console

MAX_RUNS = 1000
MAX_NAME_CHARS = 80
STOPPED_FILE = "stopped_early.json"  # in the workdir of a run that was stopped for better ones
BOOLS = {"true": True, "false": False}

Values = dict[str, Any]  # of settings, by dotted name


@dataclasses.dataclass
class Result:
    """What a run has reached.

    Attributes:
      name: of the run, and of its folder.
      values: of the settings that vary, by dotted name.
      state: "done", "stopped early", "failed", or "not done".
      bits_per_byte: of validation text; of all of it where the run is done, else as the training has scored it last.
      nats_per_token: of the same.
      steps: that it took.
      tokens: that it has learned from.
      seconds: from the command to the last step, over all its starts.
      reason: why it failed, with the last line of what it said.
    """

    name: str
    values: Values
    state: str = "not done"
    bits_per_byte: float | None = None
    nats_per_token: float | None = None
    steps: int = 0
    tokens: int = 0
    seconds: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The results of a sweep in the order of the table, and the signal that stopped it (0: none)."""

    fields: tuple[str, ...]
    results: tuple[Result, ...]
    signal: int = 0

    @property
    def failed(self) -> int:
        """How many runs have failed."""
        return sum(result.state == "failed" for result in self.results)


def parse_sweeps(texts: Sequence[str], given: Collection[str] = ()) -> dict[str, list[Any]]:
    """The values of each setting that varies, in its type, from "optimizer.learning_rate=1e-3,2e-3".

    A value that has commas itself stands in double quotes, as in CSV.

    Args:
      texts: of --sweep.
      given: settings with flags of their own.

    Raises:
      ValueError: one line, for text of another form, what is no setting, a value that breaks its rule, or is there
        twice.
    """
    known, found = settings(), {}
    if not texts:
        raise ValueError("sweep= must name what varies; try --sweep=optimizer.learning_rate=1e-3,2e-3")
    for text in texts:
        name, equals, listing = text.partition("=")
        name = name.removeprefix("--").removeprefix("config.")
        if not equals:
            raise mistake("sweep", text, "have the form NAME=VALUE,VALUE", "try --sweep=seed=0,1")
        if name not in known:
            raise ValueError(f"--sweep={text}: {name or 'the empty name'} is not a setting; {advice(name)}")
        if name in found:
            raise ValueError(f"--sweep={name} must be given once; write all values behind one --sweep={name}=")
        if name in given:
            raise ValueError(
                f"{name} must not be one value where --sweep={name} has several; leave --config.{name} out"
            )
        values = [_value(name, word) for word in next(csv.reader([listing])) or [""]]
        for value in {value: None for i, value in enumerate(values) if value in values[:i]}:
            raise mistake(name, value, f"stand once in --sweep={text}", "leave the second one out")
        found[name] = values
    return found


def _value(name: str, text: str) -> Any:
    known = settings()[name]
    kind, word = type(known.default), text if isinstance(known.default, str) else text.strip()
    try:
        value = BOOLS[word.lower()] if kind is bool else kind(word)
    except (ValueError, KeyError):
        usual = known.default if known.usual is None else known.usual
        raise mistake(name, text, f"be of type {kind.__name__}", f"try --sweep={name}={usual}") from None
    return known.read(name, value)


def named_runs(sweeps: Mapping[str, Sequence[Any]]) -> dict[str, Values]:
    """Every combination of the values, by the name of its run: as learning_rate=0.001,seed=0.

    Raises ValueError, in one line, where they are too many.
    """
    if (count := math.prod(len(values) for values in sweeps.values())) > MAX_RUNS:
        raise ValueError(f"sweep= must be at most {MAX_RUNS} runs, and these values make {count}; leave some out")
    combinations = (dict(zip(sweeps, values, strict=True)) for values in itertools.product(*sweeps.values()))
    return {name_of(values): values for values in combinations}


def name_of(values: Mapping[str, Any]) -> str:
    """The name of a run: the last words of its settings, or all of them where two end alike; fit for a folder."""
    last = [name.rpartition(".")[2] for name in values]
    short = {name: word if last.count(word) == 1 else name for name, word in zip(values, last, strict=True)}
    text = ",".join(f"{short[name]}={value}" for name, value in values.items())
    safe = re.sub(r"[^\w.,=+-]+", "_", text, flags=re.ASCII)
    if safe != text or len(safe) > MAX_NAME_CHARS:
        safe = f"{safe[:MAX_NAME_CHARS]}-{digest_of(dict(values))[:8]}"
    return safe


def run_sweep(
    recipe: Mapping[str, Any],
    sweeps: Sequence[str],
    out: Path,
    engine: Engine,
    overrides: Collection[str] = (),
    stop_early: bool = False,
) -> Sweep:
    """Trains what is missing of a sweep, and writes what all its runs have reached.

    Args:
      recipe: all settings, with those that the user gave.
      sweeps: as `parse_sweeps` reads them.
      out: folder of the sweep; it is made when missing.
      engine: where the runs are trained.
      overrides: dotted names of settings that the user gave.
      stop_early: runs that were stopped for better ones stay so.

    Raises:
      ValueError: one line, for settings that cannot work, in any of the runs, or another sweep in `out`.
      OSError: `out` cannot be written.
    """
    values = parse_sweeps(sweeps, overrides)
    runs = named_runs(values)
    configs = {name: _config(recipe, name, changes, overrides) for name, changes in runs.items()}
    wanted = {name: value for name, value in leaves(Config.build(recipe, overrides)) if name not in values}
    derived = {name for name, value in wanted.items() if any(dict(leaves(c))[name] != value for c in configs.values())}
    wanted = {name: value for name, value in wanted.items() if name not in derived}
    with ExitStack() as held:
        held.enter_context(writer_lock(out, "sweep", lambda folder: list(folder.glob("sweep.json"))))
        known = _with_known_runs(out, wanted, tuple(values), runs)
        _share_text(configs, out)
        signals = held.enter_context(StopSignals())
        given = dict.fromkeys([*overrides, *values])
        jobs = [make_job(name, config, given, _workdir(out, name), out) for name, config in configs.items()]
        jobs = [job for job in jobs if not _is_over(job.workdir, stop_early)]
        failures: dict[str, str] = {}
        with Progress("sweep", total=len(known), start=len(known) - len(jobs), unit="runs", every_seconds=60) as line:

            def on_end(job: Job, end: End) -> None:
                if end.stopped_early:
                    write_atomically(job.workdir / STOPPED_FILE, "{}\n")
                elif not job.score.is_file() and not signals.number:
                    failures[job.name] = f"{end.reason or 'no result'}: {last_line(job.log) or 'it said nothing'}"
                result = _result(out, job.name, known[job.name], failures)
                line.print(f"{job.name}: {_in_words(result)}")
                if result.state != "not done":
                    line.advance()

            engine.run(jobs, on_end, signals)
        results = sorted((_result(out, name, changes, failures) for name, changes in known.items()), key=_rank)
        sweep = Sweep(tuple(values), tuple(results), signals.number)
        _write(sweep, out)
    return sweep


def _config(recipe: Mapping[str, Any], name: str, changes: Values, overrides: Collection[str]) -> Config:
    """The config of a run. Raises ValueError, in one line that names the run, for values that do not go together."""
    varied: Any = copy.deepcopy(dict(recipe))
    for setting, value in changes.items():
        *groups, last = setting.split(".")
        functools.reduce(operator.getitem, groups, varied)[last] = value
    try:
        built = Config.build(varied, {*overrides, *changes})
    except ValueError as error:
        raise ValueError(f"run {name}: {error}") from None
    if built.mesh.processes > 1:
        rule = "be 0 in a sweep, where each run is one process"
        raise mistake("mesh.processes", built.mesh.processes, rule, "leave --config.mesh.processes out")
    return built


def _with_known_runs(
    out: Path, wanted: Values, fields: tuple[str, ...], runs: Mapping[str, Values]
) -> dict[str, Values]:
    """The runs of the folder and the new ones, which are written down; other settings than before are refused."""
    file, earlier = out / "sweep.json", {}
    if file.is_file():
        before = json_object(file.read_bytes(), file, "give another --out")
        if list(fields) != before.get("fields"):
            varied = ", ".join(before.get("fields") or ())
            raise ValueError(f"out={out} holds a sweep over {varied}; sweep over the same, or give another --out")
        for name, value in before["settings"].items():
            if name in wanted and wanted[name] != value:
                rule = f"be {format_value(value)} to go on with the sweep in {out}"
                raise mistake(name, wanted[name], rule, f"set --config.{name}={value}, or give another --out")
        earlier = before["runs"]
    known = {**earlier, **runs}
    content = {"fields": fields, "settings": wanted, "runs": known}
    write_atomically(file, json.dumps(content, indent=2) + "\n")
    return known


def _share_text(configs: Mapping[str, Config], out: Path) -> None:
    """Prepares each text that several runs read once for all of them. A text that cannot be used is left to its runs,
    which say why, and stop no other."""
    alike: dict[str, list[str]] = {}
    for name, config in configs.items():
        if not config.minutes and not config.base:  # their vocabulary is decided by the run
            used = {field: value for field, value in leaves(config) if field.startswith(("corpus.", "tokenizer."))}
            key = digest_of(used | {"seed": config.seed, "seq_len": config.model.seq_len})
            alike.setdefault(key, []).append(name)
    for key, names in alike.items():
        new = [name for name in names if not _workdir(out, name).is_dir()]
        if len(names) > 1 and new:
            with contextlib.suppress(ValueError, OSError):
                text = prepare(configs[new[0]], out / "text" / key[:12])
                for name in new:
                    link_prepared(text.workdir, _workdir(out, name))


def _workdir(out: Path, name: str) -> Path:
    return out / "runs" / name


def _is_over(workdir: Path, stop_early: bool) -> bool:
    return (workdir / SCORE_FILE).is_file() or (stop_early and (workdir / STOPPED_FILE).is_file())


def _result(out: Path, name: str, values: Values, failures: Mapping[str, str]) -> Result:
    """What a run has reached until now."""
    workdir, result = _workdir(out, name), Result(name, values)
    try:
        records = read_run(workdir)
        config = Config.load(workdir)
    except ValueError:  # it has not begun
        records = config = None
    if records and config:
        result.steps = records.step
        result.bits_per_byte = records.last("valid", "bits_per_byte")
        result.nats_per_token = records.last("valid", "nats_per_token")
        result.seconds = sum(sum(pair[:1]) for pair in session_seconds(records))
    if (score := workdir / SCORE_FILE).is_file():
        scores = json_object(score.read_bytes(), score, "remove it, and the run is scored again")
        result.state = "done"
        result.steps, result.bits_per_byte = scores["step"], scores["bits_per_byte"]
        result.nats_per_token = scores["nats_per_token"]
    elif (workdir / STOPPED_FILE).is_file():
        result.state = "stopped early"
    elif name in failures:
        result.state, result.reason = "failed", failures[name]
    result.tokens = result.steps * config.tokens_per_step if config else 0
    return result


def _rank(result: Result) -> tuple[Any, ...]:
    """Runs that are done first, the best of them on top; what has no loss comes last."""
    order = ("done", "stopped early", "not done", "failed")
    loss = result.bits_per_byte
    return order.index(result.state), math.inf if loss is None or math.isnan(loss) else loss, result.name


def _write(sweep: Sweep, out: Path) -> None:
    values = {"fields": sweep.fields, "runs": [dataclasses.asdict(result) for result in sweep.results]}
    write_atomically(out / "results.json", json.dumps(to_json(values), indent=2) + "\n")
    write_atomically(out / "results.md", markdown(sweep))
    workdirs = [_workdir(out, result.name) for result in sweep.results if result.steps]
    if workdirs:
        write_report(workdirs, out / "report.html")


def markdown(sweep: Sweep) -> str:
    """The results as a table in Markdown."""
    header, *rows = _rows(sweep)
    lines = [header, ["---"] * len(header), *([_escaped(cell) for cell in row] for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    failures = [f"- {result.name}: {result.reason}\n" for result in sweep.results if result.reason]
    return table + ("\nFailed:\n\n" + "".join(failures) if failures else "")


def _escaped(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())


def _rows(sweep: Sweep) -> list[list[str]]:
    """The cells of the table; the first row has their titles."""
    rows = [[*sweep.fields, "bits/byte", "nats/token", "steps", "tokens", "time", "state"]]
    for result in sweep.results:
        losses = [_number(result.bits_per_byte), _number(result.nats_per_token)]
        time = "–" if result.seconds is None else format_clock(result.seconds)
        values = [str(result.values[field]) for field in sweep.fields]
        rows.append([*values, *losses, f"{result.steps:,}", f"{result.tokens:,}", time, result.state])
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"


def _in_words(result: Result) -> str:
    """A run that has ended, in a few words."""
    if result.reason:
        return f"failed, {result.reason}"
    reached = f"{_number(result.bits_per_byte)} bits/byte, {result.steps:,} steps"
    return (
        f"{reached} in {format_clock(result.seconds or 0)}" if result.state == "done" else f"{result.state}, {reached}"
    )


def print_sweep(sweep: Sweep, out: Path, as_json: bool = False) -> None:
    """Prints the table, best run first, and where all of it lies; or one JSON object on one line."""
    if as_json:
        return print(json_line({"fields": sweep.fields, "runs": [dataclasses.asdict(run) for run in sweep.results]}))
    header, *rows = _rows(sweep)
    table = rich.table.Table(box=rich.box.SIMPLE)
    for title in header:
        table.add_column(title, justify="right" if title != "state" else "left")
    for row in rows:
        table.add_row(*row)
    table_console().print(table)
    for result in sweep.results:
        if result.reason:
            say(f"{result.name} failed, {result.reason}")
    best = sweep.results[0]
    if best.state == "done":
        say(f"the best: {quoted(_workdir(out, best.name))}")
    say(f"{out / 'results.json'} and results.md have the table, {out / 'report.html'} compares the runs")
