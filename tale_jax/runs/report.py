"""One HTML file about a run, or one that compares several: curves, samples, evaluations, config.

    python launch/report.py --workdir=experiments/tales
    python launch/report.py --workdir=experiments/a --workdir=experiments/b --out=a_and_b.html

The file needs no network and no script: plots are inline SVG whose colours are CSS variables, so that they follow the
light or dark theme of the reader. Everything is read from the workdir (`metrics.jsonl`, `samples.jsonl`,
`evaluations.jsonl`, `config.json`), so a run that is still training, or that diverged, can be reported too.
"""

import html
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tale_jax.config import settings
from tale_jax.evaluation.text_quality import NOT_TESTED, quality_rows
from tale_jax.runs.comparison import comparison_notes, tokenizers_differ
from tale_jax.runs.plots import NUM_COLORS, compact, plots
from tale_jax.runs.records import RunRecords, read_run
from tale_jax.utils.files import write_atomically
from tale_jax.utils.format import format_clock
from tale_jax.utils.progress import Progress

MAX_SAMPLE_STEPS = 6
SERVER = "http://127.0.0.1:8000/"  # where launch/serve.py listens, unless told


def write_report(workdirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the report of a workdir, or of several, compared; returns the path of the file.

    Args:
      workdirs: folders of experiments; the same one twice counts once.
      out: the file to write; None: `report.html` in the workdir, or `comparison.html` beside the first of several.

    Raises:
      ValueError: one line, when a workdir is missing or holds no metrics.
    """
    first = workdirs[0] if workdirs else Path()
    workdirs = list(dict.fromkeys(path.resolve() for path in workdirs))
    if not workdirs:
        raise ValueError("no workdir is given; give at least one, as --workdir=experiments/NAME")
    names = [path.name for path in workdirs]
    if len(set(names)) < len(names):
        common = os.path.commonpath(workdirs)
        names = [str(path.relative_to(common)) for path in workdirs]
    runs = [read_run(path, name) for path, name in zip(workdirs, names, strict=True)]
    if out is None:
        out = first / "report.html" if len(runs) == 1 else first.parent / "comparison.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    with Progress("drawing plots", every_seconds=math.inf):
        page = _page(runs)
    write_atomically(out, page.encode("utf-8", errors="replace"))
    return out


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return "not finite" if not math.isfinite(value) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table: `header` (HTML) above the columns, and rows that each start with their name (text)."""
    head = "".join(f"<th>{cell}</th>" for cell in ["", *header])
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(_cell(cell))}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def session_seconds(run: RunRecords) -> list[tuple[float, float]]:
    """For each session its seconds from the command to the last record, and those of them before the first step.

    Version 0.2 did not record what was before; it counts as 0.
    """
    starts = sorted((r for r in run.records.get("run", ()) if r.get("time")), key=lambda r: r["time"])
    ends = [r["time"] for kind in ("train", "valid") for r in run.records.get(kind, ()) if r.get("time")]
    bounds = [*(start["time"] for start in starts[1:]), math.inf]
    sessions = []
    for start, bound in zip(starts, bounds, strict=True):
        before = start.get("startup_seconds") or 0.0
        end = max((end for end in ends if start["time"] <= end < bound), default=start["time"])
        sessions.append((end - start["time"] + before, before))
    return sessions


def _wall_time(run: RunRecords) -> dict[str, str]:
    """How long the run took, and how much of it was before its steps, by what to call them; {} where it is unknown."""
    sessions = session_seconds(run)
    total, before = (sum(each) for each in zip(*sessions, strict=True)) if sessions else (0.0, 0.0)
    if not total:
        return {}
    if not before:
        return {"Wall time of the steps": format_clock(total)}
    was_prepared = run.records["run"][0].get("was_prepared")
    prepared = "; the text was prepared before" if was_prepared else " and preparing the text"
    return {
        "Wall time": format_clock(total),
        "of it before the steps": f"{format_clock(before)} for planning and compiling{prepared}",
    }


def _scored_part(run: RunRecords) -> str:
    """Which part of the valid split the losses along the training are of, as " of 64 of 500 windows"."""
    last = (run.records.get("valid") or [{}])[-1]
    if last.get("windows") and last.get("split_windows"):
        windows, total = last["windows"], last["split_windows"]
        return f" on {windows:,} of {total:,} windows" if windows < total else f" on all {total:,} windows"
    most = (run.config.get("evaluate") or {}).get("max_windows")  # version 0.2 recorded no more
    return f" on at most {most:,} windows" if most else ""


def _summary(run: RunRecords) -> dict[str, str]:
    """A run in a few numbers, as text, with how much of the valid split was scored; what is not known is left out."""
    start, part = run.latest_start, _scored_part(run)
    rates = [value for value in run.column("train", "tokens_per_second")[1] if math.isfinite(value)]
    shares = [value for value in run.column("train", "peak_share")[1] if math.isfinite(value)]
    waits = [value for value in run.column("train", "data_wait")[1] if math.isfinite(value)]
    tokens, params = run.last("train", "tokens"), start.get("params")
    floor, error = start.get("floor_nats_per_token"), start.get("floor_nats_per_token_stderr")
    loss_error = run.last("valid", "nats_per_token_stderr")
    interval = f" ± {1.96 * loss_error:.3f}" if loss_error and math.isfinite(loss_error) else ""
    values: dict[str, tuple[str, Any]] = {
        "Validation loss": ("{:.3f}" + f"{interval} nats/token{part}", run.last("valid", "nats_per_token")),
        "Lowest validation loss": ("{}", _lowest_loss(run)),
        "Bits per byte": ("{:.3f}", run.last("valid", "bits_per_byte")),
        "Excess": ("{:.4f}" + f" nats/token{part}", run.last("valid", "excess_nats_per_token")),
        "Entropy floor": ("{:.3f}" + (f" ± {error:.3f}" if error else ""), floor),
        "Training loss": ("{:.3f} nats/token", run.last("train", "loss")),
        "Steps": ("{:,}" + (f" of {start['total_steps']:,}" if start.get("total_steps") else ""), run.step),
        "Tokens seen": ("{}", compact(tokens) if tokens else None),
        "Parameters": ("{}", compact(params) if params else None),
        "Tokens per parameter": ("{:.1f}", tokens / params if tokens and params else None),
        "Throughput": ("{:,.0f} tokens/s", statistics.median(rates) if rates else None),
        "Share of matmul peak": ("{:.0%}", statistics.median(shares) if shares else None),
        "Waiting for data": ("{:.1%}", statistics.median(waits) if waits else None),
        **{name: ("{}", text) for name, text in _wall_time(run).items()},
        "Device": ("{}", start.get("device") or start.get("platform")),
        "Precision": ("{}", start.get("precision")),
    }
    return {
        name: form.format(value) if value == value else "not finite"  # NaN is the one number that differs from itself
        for name, (form, value) in values.items()
        if value is not None
    }


def _lowest_loss(run: RunRecords) -> str | None:
    """Where validation was best before the end: that checkpoint is what samples and evaluations are of."""
    steps, losses = run.column("valid", "nats_per_token")
    known = [(loss, step) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    if not known or min(known)[1] == known[-1][1]:
        return None
    loss, step = min(known)
    return f"{loss:.3f} nats/token at step {step:,}: its checkpoint is used"


def _warnings(run: RunRecords) -> Iterator[str]:
    steps, losses = run.column("train", "loss")
    bad = [step for step, loss in zip(steps, losses, strict=True) if not math.isfinite(loss)]
    if bad:
        yield f"{run.name}: the loss was not finite in {len(bad)} of {len(steps)} records, first at step {bad[0]:,}."


EVALUATION_FIELDS = (
    *("step", "weights", "context", "stride", "windows", "documents", "texts", "tokens", "words", "bytes"),
    *("nats_per_token", "nats_per_token_stderr", "token_perplexity", "word_perplexity", "bits_per_byte"),
    *("floor_nats_per_token", "excess_nats_per_token", "excess_nats_per_token_stderr"),
    *("sample_temperature", "accepted_share", "consistent_share", "copied_share"),
)


def _evaluations(runs: Sequence[RunRecords]) -> str:
    """A table with a column for each evaluation; of those with the same settings the latest."""
    fields = ("split", "step", "context", "stride", "weights", "sample_temperature")
    latest = {(i, *(str(e.get(key)) for key in fields)): e for i, run in enumerate(runs) for e in run.evaluations}
    if not latest:
        return ""
    names = [f"{_name(runs, i)}, " if len(runs) > 1 else "" for i, *_ in latest]
    header = [name + html.escape(str(e.get("split"))) for name, e in zip(names, latest.values(), strict=True)]
    fields = [field for field in EVALUATION_FIELDS if any(field in e for e in latest.values())]
    rows = [[field.replace("_", " "), *(e.get(field) for e in latest.values())] for field in fields]
    note = "Of whole splits: every window is scored, while the losses along the training may be of some of them."
    return f"<h2>Evaluations</h2><p>{note}</p>{_table(header, rows)}"


def _quality(runs: Sequence[RunRecords]) -> str:
    """For each run a table of its latest samples beside held-out text, for each temperature."""
    parts = []
    for i, run in enumerate(runs):
        evaluation = next((e for e in reversed(run.evaluations) if e.get("quality")), {})
        for result in evaluation.get("quality", ()):
            header, rows = quality_rows(result)
            name = f"{_name(runs, i)}, " if len(runs) > 1 else ""
            title = f"step {evaluation['step']:,}, temperature {result['temperature']:g}, {result['words']:,} words"
            parts.append(f"<h3>{name}{title}</h3>{_table(header, rows)}")
    if not parts:
        return ""
    note = (
        "Samples of the model, beside held-out text of the same length. “By chance” is the ratio of other held-out "
        f"text. {NOT_TESTED} Text that is not in range differs as the verdict says."
    )
    return f"<h2>Samples beside held-out text</h2><p>{note}</p>{''.join(parts)}"


def _name(runs: Sequence[RunRecords], index: int) -> str:
    """A run's name with the colour of its curves."""
    swatch = f'<i style="background:var(--color-{index % NUM_COLORS})"></i>' if len(runs) > 1 else ""
    return f"{swatch}{html.escape(runs[index].name)}"


def _samples(run: RunRecords, last_only: bool) -> str:
    """Samples along the training: of the last step, of the step nearest to half of it, to a quarter, ..."""
    steps = {sample["step"] for sample in run.samples}
    wanted = [max(steps) / 2**i for i in range(1 if last_only else MAX_SAMPLE_STEPS)]
    sections = []
    for step in dict.fromkeys(min(steps, key=lambda step: abs(step - target)) for target in wanted):
        texts = []
        for sample in (sample for sample in run.samples if sample["step"] == step):
            prompt = str(sample.get("prompt") or "")
            text = sample["text"].removeprefix(prompt)
            bold_prompt = f"<b>{html.escape(prompt)}</b>" if prompt else ""
            texts.append(
                f"<blockquote>{bold_prompt}{html.escape(text.strip() if not prompt else text.rstrip())}</blockquote>"
            )
        sections.append(f"<section><h3>step {step:,}</h3><div>{''.join(texts)}</div></section>")
    return "".join(sections)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _differences(runs: Sequence[RunRecords]) -> str:
    """A table of the settings that are not the same in all runs; what a config does not name has its default."""
    configs = [_flat(run.config) for run in runs]
    defaults = {name: known.default for name, known in settings().items()}
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [[name, *(config.get(name, defaults.get(name)) for config in configs)] for name in names]
    rows = [row for row in rows if len(set(map(repr, row[1:]))) > 1]
    return "<h2>Settings that differ</h2>" + _table([_name(runs, i) for i in range(len(runs))], rows) if rows else ""


def _page(runs: Sequence[RunRecords]) -> str:
    single = len(runs) == 1
    summaries = [_summary(run) for run in runs]
    if single:
        title = runs[0].name
        tiles = [f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in summaries[0].items()]
        summary = f"<dl>{''.join(tiles)}</dl>"
    else:
        title = ", ".join(run.name for run in runs)
        names = list(dict.fromkeys(name for each in summaries for name in each))
        if tokenizers_differ(runs):  # what can be compared comes first
            names.sort(key=lambda name: name != "Bits per byte")
        rows = [[name, *(each.get(name) for each in summaries)] for name in names]
        summary = _table([_name(runs, i) for i in range(len(runs))], rows) + _differences(runs)
    samples = "".join((f"<h3>{_name(runs, i)}</h3>" if not single else "") + _samples(run, not single)
                      for i, run in enumerate(runs) if run.samples)  # fmt: skip
    configs = "".join(
        f"<details><summary>Config of {html.escape(run.name)}</summary>"
        f"<pre>{html.escape(json.dumps(run.config, indent=2))}</pre></details>"
        for run in runs
        if run.config
    )
    lines = [*(line for run in runs for line in _warnings(run)), *comparison_notes(runs)]
    warnings = "".join(f'<p class="warning">{html.escape(line)}</p>' for line in lines)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)} · tale_jax</title>
<style>{STYLE}</style>
</head>
<body>
<header><p>tale_jax · {"report" if single else "comparison"}</p><h1>{html.escape(title)}</h1></header>
{warnings}
{summary}
{plots(runs)}
{_evaluations(runs)}
{_quality(runs)}
{"<h2>Samples</h2>" + samples if samples else ""}
{configs}
<footer>A look inside: <code>python launch/serve.py --workdir=DIR</code>, then
<a href="{SERVER}">{SERVER}</a> (each token's surprise, attention, every checkpoint).</footer>
</body>
</html>
"""


STYLE = """
:root { --paper: #fdfdfc; --card: #f4f4f1; --ink: #1c1d1f; --muted: #5c6068; --grid: #dfe0e2; --warn: #fdecc8;
  --color-0: #2358c9; --color-1: #c2500e; --color-2: #0b7a55; --color-3: #a8328d; --color-4: #0a7489;
  --color-5: #7a5a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --card: #1f2226; --ink: #e9eaec; --muted: #a0a6af;
  --grid: #34383e; --warn: #4a3a12; --color-0: #7aa7ff; --color-1: #ff9b5c; --color-2: #4fd1a1; --color-3: #f08fd8;
  --color-4: #5cc9e0; --color-5: #e3c04f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header p { margin: 0; color: var(--muted); font-size: .9rem; }
h1 { margin: .1rem 0 1.5rem; font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.25rem; letter-spacing: -.01em; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr)); gap: .75rem; margin: 0; }
dl div { padding: .7rem .9rem; background: var(--card); border-radius: .6rem; }
dt { color: var(--muted); font-size: .8rem; }
dd { margin: 0; font-size: 1.1rem; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2rem 1.5rem;
  margin-top: 2.5rem; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure.wide div { overflow-x: auto; }
figcaption { margin-bottom: .35rem; font-weight: 600; }
figure p { margin: .5rem 0 0; max-width: 46rem; color: var(--muted); font-size: .85rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg.wide { min-width: 36rem; }
svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 2rem .35rem 0; border-bottom: 1px solid var(--grid); text-align: left; white-space: nowrap; }
thead th { font-weight: 600; }
tbody th { color: var(--muted); font-weight: 400; }
th i { display: inline-block; width: .75em; height: .75em; margin-right: .5em; border-radius: 50%; }
section { display: grid; grid-template-columns: 7rem 1fr; gap: 0 1rem; border-top: 1px solid var(--grid); }
section h3 { margin: 1.2rem 0; color: var(--muted); font-weight: 500; font-size: .9rem; }
section:first-of-type { border-top: 0; }
blockquote { margin: 1rem 0; max-width: 42rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 1.06rem/1.6 Charter, "Iowan Old Style", Georgia, "Times New Roman", serif; }
blockquote b { color: var(--color-0); font-weight: 600; }
blockquote + blockquote { padding-top: 1rem; border-top: 1px dotted var(--grid); }
details { margin-top: 2rem; }
summary { cursor: pointer; font-weight: 600; }
pre { padding: 1rem; overflow-x: auto; background: var(--card); border-radius: .6rem;
  font-size: .85rem; line-height: 1.45; }
.warning { padding: .7rem .9rem; background: var(--warn); border-radius: .6rem; }
@media (max-width: 40rem) { section { grid-template-columns: 1fr; } section h3 { margin-bottom: 0; } }
@media print { body { max-width: none; } details { display: none; } }
"""
