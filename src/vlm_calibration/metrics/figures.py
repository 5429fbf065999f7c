"""Figures of tables for reports and W&B: reliability, histogram, risk and coverage, response to perturbation.

Each function returns a matplotlib `Figure`, 800 x 600 pixels unless it is told where to draw. Figures are built without pyplot, so that
they need no display and are safe in threads. Elements that differ in colour (Okabe & Ito, 2008) also differ in shape, line style or hatching.
"""

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from scipy.stats import binomtest
from torch import Tensor

from vlm_calibration.metrics.functional import METRICS
from vlm_calibration.metrics.table import ConfidenceTable, bin_sums

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5A5A5A"
FEW = 30  # bins with fewer answers are drawn faint, and no line leads to them

ResponseTables = dict[tuple[str, float], ConfidenceTable]
"""(kind of perturbation, its strength in [0, 1]) -> the answers to such images; ("", 0.0) holds untouched images."""


def new_figure() -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 6), dpi=100, layout="constrained")


def wilson_interval(correct: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of Wilson's 95% score interval (1927) of N accuracies by their counts, float64 [N]; each has an answer."""
    pairs = zip(correct.long().tolist(), answers.long().tolist(), strict=True)
    bounds = [binomtest(right, n).proportion_ci(method="wilson") for right, n in pairs]
    low, high = torch.tensor(bounds, dtype=torch.float64).T
    return low, high


def reliability_diagram(
    table: ConfidenceTable, *, title: str | None = None, ax: "Axes | None" = None
) -> "Figure":
    """Accuracy against mean confidence of ten bins of equal width, those of the ECE, with bin counts and a 95% Wilson band.

    Bins with fewer than `FEW` answers are faint, and neither the line nor the band leads to them.
    """
    title = title or _title(table, "Reliability: ECE", "ece", ".1%")
    figure, ax = _axes(table, title, "Stated confidence (%)", "Accuracy (%)", ax)
    ax.set(ylim=(-3, 103), yticks=range(0, 101, 10))
    ax.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1.2, label="Perfectly calibrated")
    if not table.parsed:
        ax.legend(loc="upper left", frameon=False)
        return figure
    sums = bin_sums(table, 10, "uniform")
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
    floor, centre = -38.0, 10 * torch.arange(10) + 5.0
    size = 20 * sums.answers / sums.answers.max()
    ax.bar(centre.numpy(), size.numpy(), 9.0, bottom=floor, color=GREY, alpha=0.6)
    ax.axhline(-5, color="black", linewidth=0.8)
    ax.text(-1, -7, "Answers in each bin", va="top", fontsize=9)
    ax.set_ylim(floor, 103)
    for middle, top, count in zip(centre.tolist(), size.tolist(), sums.answers.tolist(), strict=True):
        if count:
            ax.text(middle, floor + top + 0.5, f"{count:,.0f}", ha="center", va="bottom", fontsize=9)
    return figure


def confidence_histogram(table: ConfidenceTable, *, ax: "Axes | None" = None) -> "Figure":
    """Histogram of the stated confidences: correct answers upwards, wrong ones downwards; a bar a level if there are at most 20."""
    from matplotlib.ticker import MaxNLocator

    title = _title(table, "Stated confidence: AUROC", "auroc")
    figure, ax = _axes(table, title, "Stated confidence (%)", "Answers (wrong below, right above)", ax)
    if not table.parsed:
        return figure
    gap = float(table.value.diff().min()) if len(table.value) > 1 else 1.0
    if len(table.value) <= 20 and gap > 0.009:
        centre, width, correct, wrong = 100 * table.value, min(80 * gap, 4.0), table.correct, table.wrong
    else:
        sums = bin_sums(table, 20, "uniform")
        centre, width = 5 * torch.arange(20) + 2.5, 4.5
        correct, wrong = sums.correct, sums.answers - sums.correct
    ax.bar(centre.numpy(), correct.numpy(), width, color=BLUE, label="Right")
    hatched: dict[str, Any] = {"hatch": "///", "edgecolor": "white", "linewidth": 0}
    ax.bar(centre.numpy(), -wrong.numpy(), width, color=ORANGE, label="Wrong", **hatched)
    ax.axhline(0, color="black", linewidth=0.8)
    for name, heading, color, style, line_width in (
        ("mean_confidence", "Mean confidence", "black", "-", 1.6),
        ("parsed_accuracy", "Accuracy", GREEN, "--", 1.8),
    ):
        share = float(METRICS[name](table))
        label = f"{heading} {share:.1%}"
        ax.axvline(100 * share, color=color, linestyle=style, linewidth=line_width, label=label)
    top, bottom = float(correct.max()), float(wrong.max())
    margin = 0.08 * (top + bottom)
    ax.set_ylim(-bottom - margin, top + margin)
    ax.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none")
    return figure


def risk_coverage_figure(table: ConfidenceTable) -> "Figure":
    """Risk-coverage curve: error rate of the answered questions against their share, most confident first.

    Points are the thresholds that can be set; between them equally confident answers come in random order.
    """
    title = _title(table, "Risk and coverage: AURC", "aurc")
    x_label = "Coverage: most confident answers given (%)"
    figure, ax = _axes(table, title, x_label, "Risk: error rate of the answers given (%)", None)
    if not table.parsed:
        return figure
    answers, wrong = table.answers.flip(-1), table.wrong.flip(-1)
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
    return figure


def response_curve(tables: ResponseTables, *, figure: "Figure | None" = None) -> "Figure":
    """Mean stated confidence and accuracy against the strength of the perturbation, with a panel for each kind.

    A calibrated model's two curves coincide. The band is the 95% Wilson interval of the accuracy. Untouched images are in every panel.
    """
    figure = figure or new_figure()
    n = sum(table.n for table in tables.values())
    figure.suptitle(f"Response to perturbation: {n:,} answer{'' if n == 1 else 's'}", fontsize="large")
    answered = {key: table for key, table in tables.items() if table.parsed}
    kinds = sorted({kind for kind, _ in answered} - {""}) or [""]
    columns = math.ceil(math.sqrt(len(kinds)))
    rows = math.ceil(len(kinds) / columns)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for kind, ax in zip(kinds, panels, strict=False):
        curve = {strength: table for (k, strength), table in answered.items() if k in ("", kind)}
        ax.set(ylim=(-3, 103), xlim=(-0.04, 1.04), title=kind.replace("_", " "))
        ax.tick_params(labelbottom=True)
        ax.grid(alpha=0.25)
        if not curve:
            _note_empty(ax)
            continue
        strengths = sorted(curve)
        points = [curve[strength] for strength in strengths]
        correct = torch.stack([table.correct.sum() for table in points])
        answers = torch.stack([table.total for table in points])
        low, high = (100 * bound for bound in wilson_interval(correct, answers))
        confidence = [100 * float(METRICS["mean_confidence"](table)) for table in points]
        ax.fill_between(strengths, low, high, color=BLUE, alpha=0.18, linewidth=0, label="95% interval")
        ax.vlines(strengths, low, high, color=BLUE, alpha=0.55, linewidth=1.5)
        ax.plot(strengths, 100 * correct / answers, color=BLUE, marker="o", markersize=4, label="Accuracy")
        ax.plot(strengths, confidence, "s--", color=ORANGE, markersize=4, label="Mean stated confidence")
    for ax in panels[len(kinds) :]:
        ax.remove()
    # The empty lines are where the legend stands.
    label = "Strength of the perturbation on the key object (0: untouched)\n\n"
    figure.supxlabel(label, fontsize="medium")
    figure.supylabel("Percent of the answers, or stated percent", fontsize="medium")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _title(table: ConfidenceTable, heading: str, name: str, format: str = ".3f") -> str:
    value = float(METRICS[name](table))
    shown = "undefined" if math.isnan(value) else f"{value:{format}}"
    unparsed = f" ({table.unparsed:,} unparsed)" if table.unparsed else ""
    return f"{heading} {shown}, {table.n:,} answer{'' if table.n == 1 else 's'}{unparsed}"


def _axes(table: ConfidenceTable, title: str, x: str, y: str, ax: "Axes | None") -> "tuple[Figure, Axes]":
    """The given axes or new ones, x in percent, with a note if no answer states a confidence."""
    ax = new_figure().subplots() if ax is None else ax
    ax.set(title=title, xlim=(-3, 103), xticks=range(0, 101, 10), xlabel=x, ylabel=y)
    if not table.parsed:
        _note_empty(ax)
    return cast("Figure", ax.get_figure(root=True)), ax


def _note_empty(ax: "Axes") -> None:
    note = "No answer with a readable confidence"
    ax.text(0.5, 0.5, note, ha="center", va="center", transform=ax.transAxes)
