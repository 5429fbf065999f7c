"""Figures show the numbers of the table, need no display or pyplot, and work with empty tables and in threads."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from vlm_calibration.metrics import ConfidenceTable, figures
from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.perturbation import KIND_NAMES

DRAWN = [figures.reliability_diagram, figures.confidence_histogram, figures.risk_coverage_figure]


def make(n=500, levels=11, seed=0):
    rng = np.random.default_rng(seed)
    confidence = rng.integers(0, levels, n) / (levels - 1)
    correct = rng.random(n) < 0.3 + 0.5 * confidence
    return ConfidenceTable.from_predictions(torch.tensor(confidence), torch.tensor(correct))


def texts(figure):
    """All texts on a figure's first axes, including the legend."""
    ax = figure.axes[0]
    written = [ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), *(t.get_text() for t in ax.texts)]
    legend = ax.get_legend()
    return " | ".join(written + ([t.get_text() for t in legend.get_texts()] if legend else []))


def size(figure):
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    png = buffer.getvalue()
    assert png[:4] == b"\x89PNG"
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


@pytest.mark.parametrize("draw", DRAWN)
@pytest.mark.parametrize(
    "table",
    [
        make(),
        make(levels=101, n=3000),
        ConfidenceTable.from_predictions([], []),
        ConfidenceTable.from_predictions([None], [True]),
        ConfidenceTable.from_predictions([1.0], [True]),
        ConfidenceTable.from_predictions([0.0, 0.0], [False, False]),
        ConfidenceTable.from_predictions([0.123, 0.1234], [False, True], grid_steps=10_000),
    ],
    ids=["tens", "percents", "empty", "unparsed", "one right", "all 0%", "fine"],
)
def test_every_figure_draws_every_table(draw, table):
    figure = draw(table)
    assert isinstance(figure, Figure)
    assert size(figure) == (800, 600)
    ax = figure.axes[0]
    assert "(%)" in ax.get_xlabel()
    assert ax.get_ylabel()
    assert f"{table.n:,} answer" in ax.get_title()
    if table.parsed == 0:
        assert "No answer with a readable confidence" in texts(figure)


def test_the_reliability_diagram_shows_bins_counts_and_ece():
    confidence = [0.2] * 20 + [0.25] * 20 + [1.0] * 1500
    correct = [True] * 10 + [False] * 30 + [True] * 1500
    table = ConfidenceTable.from_predictions(confidence, correct)
    figure = figures.reliability_diagram(table)
    line = next(li for li in figure.axes[0].lines if li.get_label() == "Answers, by bin")
    assert line.get_xdata().tolist() == pytest.approx([22.5, 100])
    assert line.get_ydata().tolist() == pytest.approx([25, 100])
    written = texts(figure)
    for part in ("40", "1,500", "Perfectly calibrated", "95% interval", "ECE 0.1%, 1,540 answers"):
        assert part in written


def test_bins_with_few_answers_are_faint_and_no_line_leads_to_them():
    sizes = {0.15: 30, 0.35: 29, 0.55: 30, 0.75: 30}
    confidence = [c for c, n in sizes.items() for _ in range(n)]
    table = ConfidenceTable.from_predictions(confidence, [True] * len(confidence))
    ax = figures.reliability_diagram(table).axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    joined, few = lines["Answers, by bin"], lines["Bins with fewer than 30 answers"]
    assert [math.isnan(y) for y in joined.get_ydata()] == [False, True, False, False]
    assert few.get_xdata().tolist() == pytest.approx([35])
    assert few.get_linestyle() == "None"
    assert few.get_alpha() < 0.5


def test_wilson_intervals():
    """Published example: 81 of 263 is [0.2553, 0.3662] (Newcombe 1998)."""
    correct, answers = (torch.tensor(counts).double() for counts in ([81, 0, 5], [263, 0, 5]))
    low, high = figures.wilson_interval(correct, answers)
    assert [float(low[0]), float(high[0])] == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert [float(low[1]), float(high[1])] == pytest.approx([0, 1], abs=1e-9)
    assert float(high[2]) == 1


def test_the_histogram_splits_by_correctness():
    table = ConfidenceTable.from_predictions([0.9] * 5 + [0.5] * 3, [True] * 4 + [False] + [False] * 3)
    figure = figures.confidence_histogram(table)
    heights = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in figure.axes[0].containers[0]}
    assert heights == pytest.approx({50: 0, 90: 4})
    below = [bar.get_height() for bar in figure.axes[0].containers[1]]
    assert below == [-3, -1]
    assert "Mean confidence 75.0%" in texts(figure)
    assert "Accuracy 50.0%" in texts(figure)


def test_the_risk_coverage_figure_integrates_to_aurc():
    table = make(2000)
    figure = figures.risk_coverage_figure(table)
    line = next(li for li in figure.axes[0].lines if li.get_label() == "By stated confidence")
    area = np.trapezoid(line.get_ydata(), line.get_xdata()) / 1e4
    assert area == pytest.approx(float(METRICS["aurc"](table)), abs=2e-3)
    points = next(li for li in figure.axes[0].lines if li.get_label() == "Thresholds")
    assert len(points.get_xdata()) == 11
    assert points.get_xdata()[-1] == pytest.approx(100)


def response(n_kinds, strengths=(1.0, 0.5)):
    tables = {(kind, s): make(200, seed=int(100 * s)) for kind in KIND_NAMES[:n_kinds] for s in strengths}
    return {("", 0.0): make(300), **tables}


def curves(ax):
    """Label -> the x and y of each line."""
    return {li.get_label(): (list(li.get_xdata()), list(li.get_ydata())) for li in ax.lines}


def test_the_response_curve_of_one_kind():
    tables = response(1) | {("noise", 0.75): ConfidenceTable.from_predictions([], [])}
    figure = figures.response_curve(tables)
    assert size(figure) == (800, 600)
    [ax] = figure.axes
    strengths, confidence = curves(ax)["Mean stated confidence"]
    assert strengths == [0, 0.5, 1]
    expected = [tables[key] for key in (("", 0.0), ("noise", 0.5), ("noise", 1.0))]
    assert confidence == pytest.approx([100 * float(METRICS["mean_confidence"](t)) for t in expected])
    accuracy = curves(ax)["Accuracy"][1]
    assert accuracy == pytest.approx([100 * float(METRICS["parsed_accuracy"](t)) for t in expected])
    assert "700 answers" in figure.get_suptitle()


@pytest.mark.parametrize("n_kinds", [2, 5, 9])
def test_several_kinds_have_a_panel_each_and_share_the_untouched_images(n_kinds):
    tables = response(n_kinds)
    figure = figures.response_curve(tables)
    assert size(figure) == (800, 600)
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == sorted(
        k.replace("_", " ") for k in KIND_NAMES[:n_kinds]
    )
    untouched = 100 * float(METRICS["mean_confidence"](tables["", 0.0]))
    for panel in panels:
        strengths, confidence = curves(panel)["Mean stated confidence"]
        assert (strengths, confidence[0]) == ([0, 0.5, 1], untouched)
    boxes = [panel.get_tightbbox() for panel in panels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), "all labels can be read"
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(box) for box in boxes)


def test_the_response_curve_without_answers_or_perturbation():
    for tables in ({}, {("", 0.0): ConfidenceTable.from_predictions([], [])}):
        assert "No answer" in texts(figures.response_curve(tables))
    alone = figures.response_curve({("", 0.0): make()}).axes[0]
    assert curves(alone)["Accuracy"][0] == [0]


def test_given_axes_and_titles_are_used():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert figures.reliability_diagram(make(), ax=left, title="mine") is figure
    assert left.get_title() == "mine"
    assert figures.confidence_histogram(make(), ax=right) is figure
    assert figures.response_curve(response(3), figure=(given := Figure())) is given


def test_figures_are_drawn_in_threads():
    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(lambda i: size(DRAWN[i % 3](make(seed=i))), range(6)))
    assert sizes == [(800, 600)] * 6


@pytest.mark.slow
def test_no_pyplot_and_no_matplotlib_until_something_is_drawn():
    """Importing the package and computing do not import matplotlib; drawing registers no figure with pyplot."""
    code = """
import sys, torch
before = set(sys.modules)
import torchmetrics
by_torchmetrics = set(sys.modules)
from vlm_calibration.metrics import CalibrationMetrics, ConfidenceTable, figures
assert not [m for m in set(sys.modules) - by_torchmetrics if m.startswith('matplotlib')]
metrics = CalibrationMetrics()
metrics.update(torch.tensor([0.9, 0.1]), torch.tensor([True, False]))
metrics.compute()
assert not [m for m in set(sys.modules) - by_torchmetrics if m.startswith(('matplotlib', 'lightning', 'transformers'))]
figures.reliability_diagram(ConfidenceTable.from_predictions([0.9], [True]))
import matplotlib.pyplot as plt
assert not plt.get_fignums()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
