"""Figures of tables for `plot()`, reports and W&B: reliability, histogram, risk and coverage, response to perturbation.

Each function takes tables and returns a matplotlib `Figure`, 800 x 600 pixels unless axes `ax` to draw into are given. `title` replaces a
title with the number of answers and a metric. Figures are built without pyplot, so that they need no display and are safe in
threads. Colours are those of Okabe & Ito (2008); elements that differ in colour also differ in shape, line style or hatching.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.groups import bin_sums
from vlm_calibration.metrics.table import ConfidenceTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5A5A5A"
FEW = 30
"""Bins with fewer answers are drawn faint, and no line leads to them."""
_Z95 = 1.959963984540054
_RESPONSE = "Percent of the answers, or stated percent"

ResponseTables = dict[tuple[str, float], ConfidenceTable]
"""(kind of perturbation, its strength in [0, 1]) -> the answers to such images; ("", 0.0) holds untouched images."""


def new_axes() -> "Axes":
    """Axes of a new 800 x 600 pixel figure that is not registered with pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 6), dpi=100, layout="constrained").subplots()


def wilson_interval(correct: Tensor, answers: Tensor, z: float = _Z95) -> tuple[Tensor, Tensor]:
    """Wilson's score interval (1927) of an accuracy from numbers of answers, float64 of any shape, by default at 95%.

    Returns lower and upper bound, each in [0, 1], which is the interval where there is no answer. `z` is the normal quantile.
    """
    n = answers.clamp_min(1e-12)
    rate = correct / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    radius = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)).sqrt()
    return (centre - radius).clamp(0, 1), (centre + radius).clamp(0, 1)


def reliability_diagram(
    table: ConfidenceTable, *, title: str | None = None, ax: "Axes | None" = None
) -> "Figure":
    """Accuracy against mean confidence of ten bins of equal width, those of the ECE, with bin counts and a 95% Wilson band.

    Bins with fewer than `FEW` answers are faint, and neither the line nor the band leads to them.
    """
    ax = new_axes() if ax is None else ax
    _percent_axis(ax, "x", "Stated confidence (%)")
    _percent_axis(ax, "y", "Accuracy (%)")
    ax.set_title(title or f"Reliability: ECE {_text(table, 'ece', '.1%')}, {_answers(table)}")
    ax.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1.2, label="Perfectly calibrated")
    if not table.parsed:
        _note_empty(ax)
        ax.legend(loc="upper left", frameon=False)
        return _figure(ax)
    sums = bin_sums(table.groups(), 10, "uniform")
    occupied = sums.answers > 0
    answers, correct = sums.answers[occupied], sums.correct[occupied]
    x, y = 100 * sums.confidence[occupied] / answers, 100 * correct / answers
    low, high = (100 * bound for bound in wilson_interval(correct, answers))
    few = answers < FEW
    if not few.all():
        # Where a bin has few answers, NaN breaks the line and the band.
        joined, bottom, top = (values.masked_fill(few, math.nan) for values in (y, low, high))
        ax.fill_between(x, bottom, top, color=BLUE, alpha=0.18, linewidth=0, label="95% interval")
        ax.vlines(x[~few], low[~few], high[~few], color=BLUE, alpha=0.55, linewidth=1.5)
        ax.plot(x, joined, color=BLUE, marker="o", markersize=6, linewidth=1.8, label="Answers, by bin")
    if few.any():
        ax.vlines(x[few], low[few], high[few], color=BLUE, alpha=0.25, linewidth=1)
        label = f"Bins with fewer than {FEW} answers"
        ax.plot(x[few], y[few], "o", color=BLUE, markersize=5, fillstyle="none", alpha=0.4, label=label)
    ax.legend(loc="upper left", frameon=False)

    # A strip under 0% has the number of answers in each bin, as bars.
    floor = -38.0
    centre = 10 * torch.arange(10) + 5.0
    size = 20 * sums.answers / sums.answers.max()
    ax.bar(centre.numpy(), size.numpy(), 9.0, bottom=floor, color=GREY, alpha=0.6)
    ax.axhline(-5, color="black", linewidth=0.8)
    ax.text(-1, -7, "Answers in each bin", va="top", fontsize=9)
    ax.set_ylim(floor, 103)
    for middle, top, count in zip(centre.tolist(), size.tolist(), sums.answers.tolist(), strict=True):
        if count:
            ax.text(middle, floor + top + 0.5, _short(int(count)), ha="center", va="bottom", fontsize=9)
    return _figure(ax)


def confidence_histogram(
    table: ConfidenceTable, *, title: str | None = None, ax: "Axes | None" = None
) -> "Figure":
    """Histogram of the stated confidences: correct answers upwards, wrong ones downwards; a bar a level if there are at most 20."""
    from matplotlib.ticker import MaxNLocator

    ax = new_axes() if ax is None else ax
    ax.set_title(title or f"Stated confidence: AUROC {_text(table, 'auroc')}, {_answers(table)}")
    _percent_axis(ax, "x", "Stated confidence (%)")
    ax.set_ylabel("Answers (wrong below, right above)")
    if not table.parsed:
        _note_empty(ax)
        return _figure(ax)
    groups = table.groups()
    gap = float(groups.value.diff().min()) if len(groups.value) > 1 else 1.0
    if len(groups.value) <= 20 and gap > 0.009:
        centre, width, correct, wrong = 100 * groups.value, min(80 * gap, 4.0), groups.correct, groups.wrong
    else:
        sums = bin_sums(groups, 20, "uniform")
        centre, width = 5 * torch.arange(20) + 2.5, 4.5
        correct, wrong = sums.correct, sums.answers - sums.correct
    ax.bar(centre.numpy(), correct.numpy(), width, color=BLUE, label="Right")
    ax.bar(
        centre.numpy(),
        -wrong.numpy(),
        width,
        color=ORANGE,
        hatch="///",
        edgecolor="white",
        linewidth=0,
        label="Wrong",
    )
    ax.axhline(0, color="black", linewidth=0.8)
    for name, heading, color, style, line_width in (
        ("mean_confidence", "Mean confidence", "black", "-", 1.6),
        ("parsed_accuracy", "Accuracy", GREEN, "--", 1.8),
    ):
        x, label = 100 * float(METRICS[name](table)), f"{heading} {_text(table, name, '.1%')}"
        ax.axvline(x, color=color, linestyle=style, linewidth=line_width, label=label)
    top, bottom = float(correct.max()), float(wrong.max())
    margin = 0.08 * (top + bottom)
    ax.set_ylim(-bottom - margin, top + margin)
    ax.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none")
    return _figure(ax)


def risk_coverage_figure(
    table: ConfidenceTable, *, title: str | None = None, ax: "Axes | None" = None
) -> "Figure":
    """Risk-coverage curve: error rate of the answered questions against their share, most confident first.

    Points are the thresholds that can be set; between them equally confident answers come in random order. The best
    possible ranking of the same answers and a random ranking are drawn for comparison.
    """
    ax = new_axes() if ax is None else ax
    ax.set_title(title or f"Risk and coverage: AURC {_text(table, 'aurc')}, {_answers(table)}")
    _percent_axis(ax, "x", "Coverage: most confident answers given (%)")
    ax.set_ylabel("Risk: error rate of the answers given (%)")
    if not table.parsed:
        _note_empty(ax)
        return _figure(ax)
    groups = table.groups()
    answers, wrong = groups.answers.flip(-1), groups.wrong.flip(-1)
    total, errors = float(answers.sum()), float(wrong.sum())
    ends, ends_wrong = answers.cumsum(-1), wrong.cumsum(-1)
    answered = torch.cat([torch.linspace(0, total, 513, dtype=torch.float64)[1:], ends]).sort().values
    level = torch.searchsorted(ends, answered).clamp_max(len(ends) - 1)
    of_level = answered - (ends - answers)[level]
    risk = ((ends_wrong - wrong)[level] + of_level * (wrong / answers)[level]) / answered
    coverage = 100 * answered / total
    ax.plot(coverage, 100 * risk, color=BLUE, linewidth=1.8, label="By stated confidence")
    ax.plot(100 * ends / total, 100 * ends_wrong / ends, "o", color=BLUE, markersize=5, label="Thresholds")
    best = (answered - (total - errors)).clamp_min(0) / answered
    ax.plot(coverage, 100 * best, color=GREEN, linestyle="--", linewidth=1.6, label="Best possible ranking")
    ax.axhline(100 * errors / total, color=GREY, linestyle=":", linewidth=1.6, label="No ranking")
    highest = max(100 * float(risk.max()), 100 * errors / total, 1)
    ax.set_ylim(0, min(1.12 * highest, 104))
    ax.grid(alpha=0.25)
    ax.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none")
    return _figure(ax)


def response_curve(tables: ResponseTables, *, title: str | None = None, ax: "Axes | None" = None) -> "Figure":
    """Mean stated confidence and accuracy against the strength of the perturbation, with a panel for each kind.

    A calibrated model's two curves coincide. The band is the 95% Wilson interval of the accuracy.

    Args:
        tables: a table for each kind and strength; that of untouched images is shown in every panel.
        title: replaces the default title.
        ax: axes to draw into; several panels are insets of these axes.

    Raises:
        ValueError: without a table.
    """
    if not tables:
        raise ValueError("a response curve needs at least one table")
    ax = new_axes() if ax is None else ax
    first, *others = tables.values()
    ax.set_title(title or f"Response to perturbation: {_answers(sum(others, start=first))}")
    ax.set_xlabel("Strength of the perturbation on the key object (0: untouched)")
    answered = {key: table for key, table in tables.items() if table.parsed}
    if not answered:
        _percent_axis(ax, "y", _RESPONSE)
        _note_empty(ax)
        return _figure(ax)
    kinds = sorted({kind for kind, _ in answered} - {""}) or [""]
    panels = [ax] if len(kinds) == 1 else _inset_panels(ax, len(kinds))
    for kind, panel in zip(kinds, panels, strict=True):
        curve = {strength: table for (k, strength), table in answered.items() if k in ("", kind)}
        _draw_response(panel, curve, kind.replace("_", " "))
    if len(kinds) == 1:
        _percent_axis(ax, "y", _RESPONSE)
        ax.set_xlabel(
            f"Strength of {kinds[0].replace('_', ' ') or 'perturbation'} on the key object (0: untouched)"
        )
        ax.legend(*_response_legend(ax), loc="best", frameon=True, framealpha=0.9, edgecolor="none")
    else:
        ax.legend(*_response_legend(panels[0]), loc="upper center", ncols=2, frameon=False)
    return _figure(ax)


def _inset_panels(ax: "Axes", n: int) -> "list[Axes]":
    """Split axes into n panels, row by row, below a strip for the legend; tick labels stand at the outer panels only."""
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    # Shares of the axes. The legend, and the name of each panel, stand in a strip of this height.
    gap, strip = 0.04, 0.078
    width, height = (1 - gap * (columns - 1)) / columns, (1 - strip) / rows - strip
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    # The labels stand beside the tick labels of the panels.
    ax.set_xlabel(ax.get_xlabel(), labelpad=18)
    ax.set_ylabel(_RESPONSE, labelpad=28)
    panels = []
    for index in range(n):
        row, column = divmod(index, columns)
        bottom = (rows - 1 - row) * (height + strip)
        panel = ax.inset_axes((column * (width + gap), bottom, width, height))
        panel.set(ylim=(-3, 103), yticks=range(0, 101, 25), xlim=(-0.04, 1.04), xticks=(0, 0.5, 1))
        panel.tick_params(labelsize="small", labelleft=column == 0, labelbottom=index + columns >= n)
        panels.append(panel)
    return panels


def _draw_response(ax: "Axes", curve: Mapping[float, ConfidenceTable], name: str) -> None:
    """Draw the curves of one kind: strength -> the answers there; `name` is drawn above panels."""
    strengths = sorted(curve)
    rows = [curve[strength] for strength in strengths]
    correct = torch.tensor([float(table.counts[:, 1].sum()) for table in rows], dtype=torch.float64)
    answers = torch.tensor([table.parsed for table in rows], dtype=torch.float64)
    low, high = (100 * bound for bound in wilson_interval(correct, answers))
    accuracy, confidence = (
        [100 * float(METRICS[metric](table)) for table in rows]
        for metric in ("parsed_accuracy", "mean_confidence")
    )
    is_panel = ax.get_title() == ""
    size = 3.5 if is_panel else 6
    ax.fill_between(strengths, low, high, color=BLUE, alpha=0.18, linewidth=0, label="Accuracy, 95% interval")
    ax.vlines(strengths, low, high, color=BLUE, alpha=0.55, linewidth=1.5)
    ax.plot(strengths, accuracy, color=BLUE, marker="o", markersize=size, linewidth=1.8, label="Accuracy")
    ax.plot(
        strengths,
        confidence,
        color=ORANGE,
        marker="s",
        markersize=size,
        linestyle="--",
        linewidth=1.8,
        label="Mean stated confidence",
    )
    ax.grid(alpha=0.25)
    if is_panel:
        ax.set_title(name, fontsize="medium")


def _response_legend(ax: "Axes") -> tuple[list[Any], list[str]]:
    """Handles and labels; the line of the accuracy is drawn on its band."""
    band, accuracy, confidence = ax.get_legend_handles_labels()[0]
    return [(band, accuracy), confidence], ["Accuracy, 95% interval", "Mean stated confidence"]


def _percent_axis(ax: "Axes", which: str, label: str) -> None:
    ax.set(**{f"{which}lim": (-3, 103), f"{which}ticks": range(0, 101, 10), f"{which}label": label})


def _short(count: int) -> str:
    """A count in at most about four characters: 950, 1.2k, 34k, 5.6M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}" if count < 10 * size else f"{count / size:.0f}{unit}"
    return str(count)


def _text(table: ConfidenceTable, name: str, format: str = ".3f") -> str:
    value = float(METRICS[name](table))
    return "undefined" if math.isnan(value) else f"{value:{format}}"


def _answers(table: ConfidenceTable) -> str:
    unparsed = f" ({table.unparsed:,} unparsed)" if table.unparsed else ""
    return f"{table.n:,} answer{'' if table.n == 1 else 's'}{unparsed}"


def _note_empty(ax: "Axes") -> None:
    ax.text(
        0.5, 0.5, "No answer with a readable confidence", ha="center", va="center", transform=ax.transAxes
    )


def _figure(ax: "Axes") -> "Figure":
    from matplotlib.figure import Figure

    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure
