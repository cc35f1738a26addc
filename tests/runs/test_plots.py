"""Plots are SVG whose text is text and whose colours are the page's."""

import math
import re
import statistics

import pytest

from tale_jax.runs.plots import _smooth, compact, plot_rates, plots
from tale_jax.runs.records import RunRecords


def run(name="run", **losses):
    train = [
        {"step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3}
        for step, loss in enumerate(losses["loss"])
    ]
    return RunRecords(name, {}, {"run": [{}], "train": train}, [], [])


def test_colours_are_variables_of_the_page_and_text_is_text():
    page = plots([run(loss=[3.0, 2.0, 1.5])])
    colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", page))
    assert not colours & {"#010101", "#020202", "#030303", "#040000"}
    assert "var(--color-0)" in page and "var(--muted)" in page
    assert ">nats per token</text>" in page and 'aria-label="Gradient norm"' in page


def test_runs_have_colours_of_their_own():
    page = plots([run(f"run {i}", loss=[3.0, 2.0]) for i in range(3)])
    assert all(f"var(--color-{i})" in page and f">run {i}</text>" in page for i in range(3))


def test_a_plot_of_nothing():
    assert plots([run(loss=[])]) == "<p>No step has been recorded yet.</p>"


def test_smoothing_keeps_ends_and_drops_and_removes_spikes():
    assert _smooth([3.0, 1.0]) == [3.0, 1.0]
    values = [2.0] * 100 + [1.0] * 100
    smoothed = _smooth([*values[:50], 90.0, *values[51:]])
    assert smoothed == pytest.approx(values, abs=0.4) and smoothed[50] == 2.0
    assert statistics.fmean(abs(a - b) for a, b in zip(smoothed, values, strict=True)) < 0.01
    assert math.isnan(_smooth([1.0, math.nan, 1.0])[1])


def test_large_numbers_are_short():
    assert [compact(v) for v in (0.5, 999, 1234, 12_345_678, 2e9)] == ["0.5", "999", "1.23k", "12.3M", "2G"]


def test_rates_become_a_picture(tmp_path):
    rate = {"tokens_per_second": 1000.0, "low": 900.0, "high": 1100.0, "peak_share": 0.5}
    unknown = rate | {"peak_share": None}
    plot_rates({"a": {"train": rate, "device": "cpu"}, "b": {"train": unknown}}, tmp_path / "new" / "rates.png")
    assert (tmp_path / "new" / "rates.png").read_bytes().startswith(b"\x89PNG")
