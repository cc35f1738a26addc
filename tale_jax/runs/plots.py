"""Plots of one run or several as inline SVG, for a page that is read in light and in dark.

Text stays text, in the font of the page, and colours are CSS variables of the page: `--ink --muted --grid --color-0 ...
--color-5`. Where a plot compares runs, run i has colour i.
"""

import html
import io
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tale_jax.runs.comparison import loss_unit
from tale_jax.runs.records import RunRecords

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # matplotlib is imported where plots are made: slow to import, and the run-time checks of the tests need a type
    Axes = Figure = Any

FIRST_DOCUMENTS_NOTE = """A training window holds a document and then the opening of the next one, which no model can
predict from what stands before. The training loss counts these openings; validation has none, so training lies above
it. The dashed line is measured as validation is, on the first document of some training windows: the same tokens in
both. Where it lies below validation, the model fits its training text better than new text."""

NUM_COLORS = 6  # --color-0 to --color-5 in the page's style sheet
INK, MUTED, GRID = "#010101", "#020202", "#030303"  # stand for CSS variables while matplotlib draws
COLORS = [f"#0400{i:02x}" for i in range(NUM_COLORS)]


def plots(runs: Sequence[RunRecords]) -> str:
    """The plots of the runs as HTML: loss, excess over the entropy floor, learning rate, gradient norm, throughput."""
    import matplotlib

    style: dict[Any, Any] = {
        "font.size": 10,
        "font.family": "sans-serif",
        "svg.fonttype": "none",
        "svg.hashsalt": "tale_jax",
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.unicode_minus": True,
        "legend.frameon": False,
        "legend.labelcolor": INK,
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(style):
        figures = [
            ("Loss", "wide", _loss_figure(runs), _loss_note(runs)),
            ("Excess over the entropy floor", "half", _excess_figure(runs), ""),
            ("Learning rate", "half", _line_figure(runs, "learning_rate", "learning rate"), ""),
            ("Gradient norm", "half", _line_figure(runs, "grad_norm", "global norm, before clipping", smooth=True), ""),
            ("Throughput", "half", _throughput_figure(runs), ""),
        ]
        shown = [
            f'<figure class="{shape}"><figcaption>{title}</figcaption><div>{_svg(figure, shape, title)}</div>'
            f"{note and f'<p>{html.escape(note)}</p>'}</figure>"
            for title, shape, figure, note in figures
            if figure is not None
        ]
    return f'<div class="plots">{"".join(shown)}</div>' if shown else "<p>No step has been recorded yet.</p>"


def plot_rates(records: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws the rates of benchmark records (see `bench/throughput.py`), by their names, into a PNG file of its own.

    One panel each for training, scoring and so on: tokens per second with quartiles, and the share of the matmul peak.
    """
    from matplotlib.figure import Figure

    names = list(records)
    kinds = [kind for kind, rate in records[names[0]].items() if isinstance(rate, Mapping) and "low" in rate]
    figure = Figure(figsize=(3.2 * len(kinds) + 1, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        rates = [records[name][kind] for name in names]
        middle = [rate["tokens_per_second"] for rate in rates]
        spread = [[m - r["low"] for m, r in zip(middle, rates)], [r["high"] - m for m, r in zip(middle, rates)]]
        bars = axes.bar(range(len(names)), middle, yerr=spread, capsize=3, width=0.6, color="#4878a8")
        shares = ["" if r["peak_share"] is None else f"\n{r['peak_share']:.0%} of peak" for r in rates]
        axes.bar_label(bars, [f"{compact(rate)}{share}" for rate, share in zip(middle, shares)])
        axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 2 else 0)
        axes.set_ylim(0, 1.25 * max(r["high"] for r in rates))
        axes.set_title(kind, loc="left")
        axes.set_ylabel("tokens per second")
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def plot_ladder(ladder: Mapping[str, Any], path: Path) -> None:
    """Draws the rungs of a ladder (see `runs/ladder.py`), and what they predict, into a PNG file.

    Work (weights times tokens) from left to right, bits per byte upwards; intervals as bars.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()

    def works(runs: Iterable[Mapping[str, Any]]) -> list[float]:
        return [run["num_weights"] * run["tokens"] for run in runs]

    rungs = sorted(ladder["rungs"].values(), key=lambda run: run["num_weights"] * run["tokens"])
    axes.plot(works(rungs), [run["predicted"] for run in rungs], "_", color="#888888", ms=14, label="law")
    axes.plot(works(rungs), [run["bits_per_byte"] for run in rungs], "o", color="#4878a8", label="rungs")
    answer = ladder["answer"]
    for run, middle, color, label in (
        (answer, answer["bits_per_byte"], "#b0562c", f"predicted for {ladder['minutes']:g} minutes"),
        *([(ladder["check"], ladder["check"]["predicted"], "#5a8f4a", "predicted before")] if ladder["check"] else []),
    ):
        spread = [[middle - run["lower"]], [run["upper"] - middle]]
        axes.errorbar(works([run]), [middle], yerr=spread, fmt="_", ms=14, color=color, capsize=4, label=label)
    if ladder["check"]:
        axes.plot(works([ladder["check"]]), [ladder["check"]["bits_per_byte"]], "o", color="#5a8f4a", label="measured")
    axes.set_xscale("log")
    axes.set_xlabel("weights × tokens")
    axes.set_ylabel("bits per byte, validation")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def compact(value: float | int) -> str:
    """12,345,678 as 12.3M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _smooth(values: Sequence[float]) -> list[float]:
    """Means of the middle half of the values in a window of about 3 % of the points: a spike or a drop stays narrow."""
    smoothed = []
    for i, value in enumerate(values):
        before = min(i, len(values) // 60)
        after = min(before, len(values) - 1 - i)
        window = sorted(v for v in values[i - before : i + after + 1] if math.isfinite(v))
        quarter = len(window) // 4
        smoothed.append(statistics.fmean(window[quarter : len(window) - quarter]) if math.isfinite(value) else math.nan)
    return smoothed


def _new_figure(runs: Sequence[RunRecords], width: float, height: float, ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylabel(ylabel)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    last = max(run.step for run in runs)
    axes.set_xlim(-0.015 * last, 1.015 * last)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(which="both", length=0, colors=MUTED)
    return figure, axes


def _svg(figure: Figure, shape: str, description: str) -> str:
    """The figure as inline SVG."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' id="[A-Za-z.]+_\d+"', "", svg)  # would repeat from plot to plot
    variables = {INK: "--ink", MUTED: "--muted", GRID: "--grid"}
    variables |= {color: f"--color-{i}" for i, color in enumerate(COLORS)}
    for color, variable in variables.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg ", f'<svg class="{shape}" role="img" aria-label="{html.escape(description)}" ', 1)


def _loss_note(runs: Sequence[RunRecords]) -> str:
    """What the reader of the loss plot must know; of several runs the page says it."""
    scored = any(run.column("valid", "train_nats_per_token")[0] for run in runs)
    return " ".join(FIRST_DOCUMENTS_NOTE.split()) if scored and len(runs) == 1 else ""


def _loss_figure(runs: Sequence[RunRecords]) -> Figure | None:
    if not any(run.column("train", "loss")[0] or run.column("valid", "nats_per_token")[0] for run in runs):
        return None
    unit = loss_unit(runs)
    figure, axes = _new_figure(runs, 10.4, 4.4, unit.name)
    late_losses: list[float] = []  # after the first steep part: what the plot should have room for
    single = len(runs) == 1
    for run, factor, color in zip(runs, unit.factors, itertools.cycle(COLORS), strict=False):
        steps, losses = _scaled(run.column("train", "loss"), factor)
        smoothed = _smooth(losses)
        if len(steps) > 20:
            axes.plot(steps, losses, color=color, linewidth=0.8, alpha=0.25)
        label = "training" if single else run.name
        axes.plot(steps, smoothed, color=color, linewidth=1.8, label=label, marker=_dot(steps))
        valid_steps, valid = _scaled(run.column("valid", "nats_per_token"), factor)
        first_steps, first = run.column("valid", "train_nats_per_token")
        if single and first:
            style: dict[str, Any] = {"linewidth": 1.2, "linestyle": (0, (3, 2)), "marker": "o", "markersize": 3}
            axes.plot(first_steps, first, color=color, label="training, first document of a window", **style)
        if single:
            axes.plot(valid_steps, valid, color=COLORS[1], linewidth=1.2, marker="o", markersize=5, label="validation")
        else:
            axes.plot(valid_steps, valid, color=color, linewidth=0, marker="o", markersize=5)
        late = 0.08 * max([*steps, *valid_steps, 0])
        late_losses += [v for s, v in zip(steps + valid_steps, smoothed + valid, strict=True) if s >= late]
    late_losses = [value for value in late_losses if math.isfinite(value)]
    floors = {
        tuple(
            round(factor * (run.latest_start.get(name) or 0.0), 6)
            for name in ("floor_nats_per_token", "floor_nats_per_token_stderr")
        )
        for run, factor in zip(runs, unit.factors, strict=True)
        if run.latest_start.get("floor_nats_per_token") and math.isfinite(factor)
    }
    for floor, error in sorted(floors):
        axes.axhline(floor, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        if error:
            axes.axhspan(floor - error, floor + error, color=INK, alpha=0.12, linewidth=0)
        label = f"entropy floor {floor:.3f}" + (f" ± {error:.3f}" if error else "")
        axes.annotate(
            label, (1, floor), xycoords=("axes fraction", "data"), xytext=(-2, -4), textcoords="offset points",
            ha="right", va="top", color=INK, fontsize=9,
        )  # fmt: skip
    if late_losses:
        low, high = min([*late_losses, *(floor for floor, _ in floors)]), max(late_losses)
        margin = 0.06 * (high - low) or 0.5
        axes.set_ylim(low - (2.2 if floors else 1.0) * margin, high + margin)
    if not single:
        axes.plot([], [], color=MUTED, linewidth=0, marker="o", markersize=5, label="validation")
    axes.legend(loc="upper right")
    return figure


def _scaled(column: tuple[list[int], list[float]], factor: float) -> tuple[list[int], list[float]]:
    return column[0], [value * factor for value in column[1]]


def _dot(steps: Sequence[int]) -> str | None:
    """A marker where a line would be a single point, which is not seen."""
    return "o" if len(steps) == 1 else None


def _excess_figure(runs: Sequence[RunRecords]) -> Figure | None:
    unit = loss_unit(runs)
    curves = [
        _scaled(run.column("valid", "excess_nats_per_token"), factor)
        for run, factor in zip(runs, unit.factors, strict=True)
    ]
    if not any(value > 0 for _, values in curves for value in values):
        return None
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = _new_figure(runs, 5.1, 3.1, unit.name)
    for (steps, values), color in zip(curves, itertools.cycle(COLORS), strict=False):
        positive = [value if value > 0 else math.nan for value in values]
        axes.plot(steps, positive, color=color, linewidth=1.6, marker="o", markersize=4)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    return figure


def _line_figure(runs: Sequence[RunRecords], field: str, ylabel: str, smooth: bool = False) -> Figure | None:
    curves = [run.column("train", field) for run in runs]
    if not any(math.isfinite(value) for _, values in curves for value in values):
        return None
    figure, axes = _new_figure(runs, 5.1, 3.1, ylabel)
    for (steps, values), color in zip(curves, itertools.cycle(COLORS), strict=False):
        if smooth and len(steps) > 20:
            axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
        axes.plot(steps, _smooth(values) if smooth else values, color=color, linewidth=1.6, marker=_dot(steps))
    finite = sorted(value for _, values in curves for value in values if math.isfinite(value))
    if finite[-1] > 0:  # a few spikes must not flatten the rest
        axes.set_ylim(0, 1.15 * (min(finite[-1], 3 * finite[int(0.98 * (len(finite) - 1))])))
    return figure


def _throughput_figure(runs: Sequence[RunRecords]) -> Figure | None:
    figure = _line_figure(runs, "tokens_per_second", "tokens per second", smooth=True)
    if figure is None:
        return None
    axes = figure.axes[0]
    axes.yaxis.set_major_formatter(lambda value, _: compact(value))
    ratios = {
        round(record["tokens_per_second"] / record["peak_share"], 1)
        for run in runs
        for record in run.records.get("train", ())
        if record.get("peak_share") and record.get("tokens_per_second")
    }
    if ratios and max(ratios) - min(ratios) < 1e-3 * max(ratios):  # one machine and model size: one scale for all
        peak = max(ratios)

        def scale(factor: float) -> Callable[[Any], Any]:
            return lambda values: values * factor

        share = axes.secondary_yaxis("right", functions=(scale(100 / peak), scale(peak / 100)))
        share.set_ylabel("% of matmul peak")
        share.yaxis.set_major_formatter(lambda percent, _: f"{percent:g}" if percent else "")
        share.tick_params(length=0, colors=MUTED)
        share.spines["right"].set_visible(False)
    return figure
