"""Many runs of one recipe: each combination of some settings' values is a run, and one table tells what they reached.

    python launch/sweep.py --config=configs/tales.py --sweep=optimizer.learning_rate=1e-3,2e-3 --sweep=seed=0,1 \
        --out=experiments/rates

`out` holds `sweep.json` (what is swept), `text/` (prepared once for all runs of the same text), `runs/NAME/` (a workdir
each), `logs/NAME.txt`, and `results.json`, `results.md` and `report.html`. The same command goes on with a sweep that
was interrupted, and tries again what failed; one with more values adds their runs.
"""

import hashlib
import itertools
import json
import math
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
import rich.table

from tale_jax.config import Config, advice, leaves, settings
from tale_jax.data.prepare import link_prepared, prepare
from tale_jax.runs.engines import Ending, Engine, Task
from tale_jax.runs.plots import compact
from tale_jax.runs.records import read_metrics
from tale_jax.runs.report import write_report
from tale_jax.utils.files import json_line, json_object, write_atomically
from tale_jax.utils.format import format_duration
from tale_jax.utils.locks import writer_lock
from tale_jax.utils.settings import mistake
from tale_jax.utils.streams import notice, say, table_console

MAX_NAME_CHARS = 120
MEASURES = ("bits_per_byte", "nats_per_token")
Changes = Mapping[str, Any]  # settings by dotted name


def read_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """What is swept: dotted name → values, from texts NAME=VALUE,VALUE.

    Raises ValueError, in one line, for a name that is no setting, a value that is none of it, or one given twice.
    """
    known, axes = settings(), dict[str, list[Any]]()
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("config.")
        if not equals or not values:
            raise ValueError(f"sweep={text} must be NAME=VALUE,VALUE; try --sweep=seed=0,1")
        if name not in known:
            raise ValueError(f"sweep={name}: there is no such setting; {advice(name, '--sweep=')}")
        if name in axes:
            raise ValueError(f"sweep={name} must be given once; write its values behind one --sweep, with commas")
        axes[name] = [known[name].read(name, _typed(value.strip(), known[name].default)) for value in values.split(",")]
        if twice := [value for index, value in enumerate(axes[name]) if value in axes[name][:index]]:
            raise ValueError(f"sweep={name}={twice[0]} must be given once; leave the second out")
    return axes


def _typed(text: str, default: Any) -> Any:
    """A value as its setting has it; the text itself where it is none, for the setting to refuse."""
    kinds = {"true": True, "false": False}
    if isinstance(default, bool):
        return kinds.get(text.lower(), text)
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            return text
    return text


def runs_of(axes: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Every combination of the values: name of the run → its settings, the last axis changing fastest."""
    short = [name.rpartition(".")[2] for name in axes]
    labels = dict(
        zip(axes, (s if short.count(s) == 1 else name for s, name in zip(short, axes, strict=True)), strict=True)
    )
    runs = dict[str, dict[str, Any]]()
    for values in itertools.product(*axes.values()):
        changes = dict(zip(axes, values, strict=True))
        text = ",".join(f"{labels[name]}={value}" for name, value in changes.items())
        safe = re.sub(r"[^\w.,=+-]", "-", text)
        if safe != text or len(safe) > MAX_NAME_CHARS:
            safe = f"{safe[:MAX_NAME_CHARS]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        runs[safe] = changes
    return runs


def run_sweep(
    values: Mapping[str, Any],
    command: Sequence[str],
    axes: Mapping[str, Sequence[Any]],
    out: Path,
    engine: Engine,
    overrides: Collection[str] = (),
) -> tuple[dict[str, dict[str, Any]], int]:
    """Runs what is missing of a sweep: the results of all its runs by name, and the signal that stopped it (0: none).

    Args:
      values: of every setting, as a recipe gives them.
      command: what trains this recipe, but for the swept settings and the workdir.
      axes: what is swept, as `read_axes` gives it.
      out: folder of the sweep; it is made when missing.
      engine: who runs them.
      overrides: dotted names of settings that the user gave.

    A result has `settings`, `state` ("finished", "failed", "stopped" or "waiting"), `reason` (of a failure), and as far
    as the run came `steps`, `tokens`, `seconds`, and of its best validation `step`, `bits_per_byte`, `nats_per_token`.

    Raises:
      ValueError: one line, for settings that some run may not have, or another sweep in `out`.
      OSError: `out` cannot be written.
    """
    if given := [name for name in axes if name in overrides]:
        raise ValueError(f"{given[0]} is swept, and given besides; leave --config.{given[0]} out")
    runs = runs_of(axes)
    configs = {name: _config_of(values, changes, overrides) for name, changes in runs.items()}
    with writer_lock(out, "sweep", lambda folder: list(folder.glob("sweep.json"))):
        runs = _begin(out, _config_of(values, {}, overrides), axes, runs)
        results = {name: _result(out, name, changes) for name, changes in runs.items()}
        left = [name for name in runs if name in configs and results[name]["state"] != "finished"]
        if done := len(runs) - len(left):
            notice(f"{done} of {len(runs)} runs are finished")
        tasks = []
        for name in left:
            workdir = out / "runs" / name
            if not configs[name].base:  # a base brings the tokenizer
                link_prepared(_prepared(configs[name], out), workdir)
            flags = [f"--config.{setting}={value}" for setting, value in runs[name].items()]
            tasks.append(Task(name, [*command, *flags, f"--workdir={workdir}"], out / "logs" / f"{name}.txt"))

        def on_end(task: Task, ending: Ending) -> None:
            results[task.name] = result = _result(out, task.name, runs[task.name], ending)
            _write(out, results)
            ended = sum(each["state"] in ("finished", "failed") for each in results.values())
            reached = f"{result['bits_per_byte']:.4f} bits/byte" if "bits_per_byte" in result else "no loss"
            said = reached if result["state"] == "finished" else f"{result['state']}: {result['reason']}"
            notice(f"{task.name} ({ended} of {len(results)}): {said}")

        _write(out, results)
        signal = engine(tasks, on_end) if tasks else 0
        _write(out, results)
        if with_losses := [out / "runs" / name for name, result in results.items() if "bits_per_byte" in result]:
            write_report(with_losses, out / "report.html")
    return results, signal


def _config_of(values: Mapping[str, Any], changes: Changes, overrides: Collection[str]) -> Config:
    changed = json.loads(json.dumps(values))
    for name, value in changes.items():
        *groups, last = name.split(".")
        part = changed
        for group in groups:
            part = part[group]
        part[last] = value
    return Config.build(changed, {*overrides, *changes})


def _begin(out: Path, config: Config, axes: Mapping[str, Sequence[Any]], runs: dict[str, Any]) -> dict[str, Any]:
    """The runs of the sweep in `out`: those that it has, and new ones. Raises ValueError where it is another sweep."""
    file, fixed = out / "sweep.json", {name: value for name, value in leaves(config) if name not in axes}
    if file.is_file():
        before = json_object(file.read_bytes(), file, "give another --out")
        if list(before.get("axes", ())) != list(axes):
            swept = " and ".join(before.get("axes", ())) or "nothing"
            raise ValueError(f"out={out} holds a sweep over {swept}; give another --out")
        then = before.get("settings", {})
        if differing := [name for name in fixed if then.get(name) != fixed[name]]:
            raise mistake(
                differing[0], fixed[differing[0]], f"be {then.get(differing[0])} in this sweep", "give another --out"
            )
        runs = dict(before.get("runs", {})) | runs
    content = {"axes": {name: list(values) for name, values in axes.items()}, "settings": fixed, "runs": runs}
    write_atomically(file, json.dumps(content, indent=2) + "\n")
    return runs


def _prepared(config: Config, out: Path) -> Path:
    """The folder with the text of a run, prepared once for all that read the same."""
    used = {name: value for name, value in leaves(config) if name.split(".")[0] in ("corpus", "tokenizer")}
    used |= {"seed": config.seed, "model.seq_len": config.model.seq_len}
    folder = out / "text" / hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:12]
    prepare(config, folder)
    return folder


def _result(out: Path, name: str, changes: Changes, ending: Ending | None = None) -> dict[str, Any]:
    """What is known of a run, from its workdir and how it ended (None: as an earlier command left it)."""
    result: dict[str, Any] = {"settings": dict(changes), "state": "waiting"}
    records = read_metrics(out / "runs" / name)
    starts, losses = records.get("run", []), [r for r in records.get("valid", []) if r.get("bits_per_byte")]
    trained = records.get("train", [])
    steps = max((record["step"] for record in (*trained, *losses)), default=0)
    total = starts[-1].get("total_steps") if starts else None
    if losses:
        best = min(losses, key=lambda record: record["bits_per_byte"])
        result |= {measure: best[measure] for measure in MEASURES} | {"step": best["step"]}
    rates = [r["tokens_per_second"] for r in trained if r.get("tokens_per_second")]
    if trained:
        tokens = trained[-1].get("tokens", 0)
        result |= {"steps": steps, "tokens": tokens}
        result |= {"seconds": tokens / statistics.median(rates)} if rates else {}
    if ending is None:
        is_whole = total is not None and steps >= total and losses and losses[-1]["step"] >= total
        return result | ({"state": "finished"} if is_whole else {})
    if ending.code == 0:
        return result | {"state": "finished"}
    if ending.code is not None and ending.code > 128 and ending.code != 137:  # asked to save and stop
        return result | {"state": "stopped", "reason": ending.last_line}
    return result | {"state": "failed", "reason": ending.last_line or f"exit code {ending.code}"}


def _write(out: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    header, rows = table_of(results)
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
    write_atomically(out / "results.md", table + "\n")


def table_of(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, the best run first, and those without a loss last."""
    names = list(next(iter(results.values()))["settings"])
    header = [*names, "bits/byte", "nats/token", "at step", "steps", "tokens", "time", "state"]
    ordered = sorted(results.values(), key=lambda result: result.get("bits_per_byte", math.inf))
    rows = []
    for result in ordered:
        row = [str(result["settings"][name]) for name in names]
        row += [f"{result[measure]:.4f}" if measure in result else "–" for measure in MEASURES]
        row += [f"{result[field]:,}" if field in result else "–" for field in ("step", "steps")]
        row += [compact(result["tokens"]) if "tokens" in result else "–"]
        row += [format_duration(result["seconds"]) if "seconds" in result else "–"]
        rows.append([*row, result["state"] + (f": {result['reason']}" if result["state"] == "failed" else "")])
    return header, rows


def print_sweep(results: Mapping[str, Mapping[str, Any]], out: Path, as_json: bool = False) -> None:
    """Prints the table, or all results as one JSON object on one line."""
    if as_json:
        return print(json_line(results))
    header, rows = table_of(results)
    table = rich.table.Table(*header, box=rich.box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    table_console().print(table)
    say(f"{out / 'results.json'} and {out / 'results.md'} have the table, {out / 'report.html'} the curves")
