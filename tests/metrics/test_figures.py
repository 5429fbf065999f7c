"""Figures show the numbers of the table, need no display or pyplot, and work with empty tables and in threads."""

import math
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib import pyplot
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


def curves(ax):
    """Label -> the x and y of each line."""
    return {li.get_label(): (list(li.get_xdata()), list(li.get_ydata())) for li in ax.lines}


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
        ConfidenceTable.from_predictions([0.123, 0.1234], [False, True], grid_steps=10_000),
    ],
    ids=["tens", "percents", "empty", "unparsed", "fine"],
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
    assert curves(figure.axes[0])["Answers, by bin"] == (pytest.approx([22.5, 100]), pytest.approx([25, 100]))
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
    correct, answers = (torch.tensor(counts).double() for counts in ([81, 0, 5], [263, 1, 5]))
    low, high = figures.wilson_interval(correct, answers)
    assert [float(low[0]), float(high[0])] == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert [float(low[1]), float(high[1])] == pytest.approx([0, 1.96**2 / (1 + 1.96**2)], abs=1e-5)
    assert float(high[2]) == 1


def test_the_histogram_splits_by_correctness():
    table = ConfidenceTable.from_predictions([0.9] * 5 + [0.5] * 3, [True] * 4 + [False] + [False] * 3)
    figure = figures.confidence_histogram(table)
    above, below = figure.axes[0].containers
    heights = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in above}
    assert heights == pytest.approx({50: 0, 90: 4})
    assert [bar.get_height() for bar in below] == [-3, -1]
    assert "Mean confidence 75.0%" in texts(figure)
    assert "Accuracy 50.0%" in texts(figure)


def test_the_risk_coverage_figure_integrates_to_aurc():
    table = make(2000)
    drawn = curves(figures.risk_coverage_figure(table).axes[0])
    coverage, risk = drawn["By stated confidence"]
    assert np.trapezoid(risk, coverage) / 1e4 == pytest.approx(float(METRICS["aurc"](table)), abs=2e-3)
    assert len(drawn["Thresholds"][0]) == 11
    assert drawn["Thresholds"][0][-1] == pytest.approx(100)


def response(n_kinds, strengths=(1.0, 0.5)):
    tables = {(kind, s): make(200, seed=int(100 * s)) for kind in KIND_NAMES[:n_kinds] for s in strengths}
    return {("", 0.0): make(300), **tables}


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


@pytest.mark.parametrize("n_kinds", [2, 9])
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
    alone = figures.response_curve({("", 0.0): make()}, figure=(given := Figure()))
    assert alone is given
    assert curves(alone.axes[0])["Accuracy"][0] == [0]


def test_figures_are_drawn_in_threads_without_pyplot():
    before = pyplot.get_fignums()
    with ThreadPoolExecutor(3) as pool:
        sizes = list(pool.map(lambda draw: size(draw(make())), DRAWN))
    assert sizes == [(800, 600)] * 3
    assert pyplot.get_fignums() == before
