"""Drift of confidences by group of answers: what `monitor` computes, prints, draws and logs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vlm_calibration.files import json_number
from vlm_calibration.metrics.drift import Drift, detect_drift, two_sample_p_value
from vlm_calibration.metrics.figures import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OVERALL = "overall"
UNPARSED_AT = -8.0
"""Where the histogram shows unparsed answers, in percent."""
MAX_LOGGED = 500
"""Number of points of a logged curve of wealth."""


class MonitoredAnswer(NamedTuple):
    """An answer without its correctness.

    Attributes:
        confidence: in [0, 1], NaN if unparsed.
        groups: the groups that it counts in, beside all answers.
    """

    confidence: float
    groups: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class GroupDrift:
    """The new answers of a group against its reference.

    Attributes:
        name: of the group; `OVERALL` for all answers, which come first.
        reference: float64 [M], confidences, NaN if unparsed.
        new: float64 [N], in the order of the stream; may be empty.
        number: int64 [N], number of each in the whole stream, from 1.
        error: largest probability of a false alarm.
        p_value: of the two-sample test; None without new answers.
        drift: of the sequential test; None without new answers.
    """

    name: str
    reference: np.ndarray
    new: np.ndarray
    number: np.ndarray
    error: float
    p_value: float | None
    drift: Drift | None

    @property
    def alarm(self) -> int | None:
        """The answer at which the wealth reached 1 / `error`, by its number in the whole stream; None without drift."""
        alarm = None if self.drift is None else self.drift.alarm
        return None if alarm is None else int(self.number[alarm - 1])

    @property
    def log10_wealth(self) -> np.ndarray:
        """float64 [N]."""
        return np.empty(0) if self.drift is None else self.drift.log_wealth / math.log(10)

    @property
    def verdict(self) -> str:
        if self.drift is None:
            return "no answers"
        return "no drift" if self.alarm is None else f"drift since answer {self.alarm}"

    def to_dict(self) -> dict[str, Any]:
        """Its figures as JSON values."""
        wealth = self.log10_wealth
        return {
            "reference_n": len(self.reference),
            "new_n": len(self.new),
            "reference_mean_confidence": _json_mean(self.reference),
            "new_mean_confidence": _json_mean(self.new),
            "reference_unparsed": int(np.isnan(self.reference).sum()),
            "new_unparsed": int(np.isnan(self.new).sum()),
            "p_value": self.p_value,
            "log10_wealth": float(wealth[-1]) if len(wealth) else None,
            "log10_highest_wealth": float(wealth.max()) if len(wealth) else None,
            "log10_alarm_line": -math.log10(self.error),
            "drift_since": self.alarm,
        }


def compare_groups(
    reference: Sequence[MonitoredAnswer], new: Sequence[MonitoredAnswer], certainty: float
) -> list[GroupDrift]:
    """Compare all answers, and those of each group of the reference; with G comparisons, each has an error of (1 - certainty) / G.

    So the probability of a false alarm anywhere is at most 1 - certainty. New answers of a group without reference count overall alone.
    """
    names = [None, *sorted({group for answer in reference for group in answer.groups})]
    error = (1 - certainty) / len(names)
    return [_compare(name, reference, new, error) for name in names]


def _compare(
    group: str | None, reference: Sequence[MonitoredAnswer], new: Sequence[MonitoredAnswer], error: float
) -> GroupDrift:
    """Compare the answers of a group, or all for None."""

    def confidences(answers: Sequence[MonitoredAnswer], members: np.ndarray) -> np.ndarray:
        return np.array([a.confidence for a in answers], dtype=np.float64)[members]

    old_members, members = (
        np.array([group is None or group in a.groups for a in answers]) for answers in (reference, new)
    )
    old, confidence = confidences(reference, old_members), confidences(new, members)
    number, name = np.flatnonzero(members) + 1, OVERALL if group is None else group
    if not len(confidence):
        return GroupDrift(name, old, confidence, number, error, None, None)
    drift = detect_drift(old, confidence, error)
    return GroupDrift(name, old, confidence, number, error, two_sample_p_value(old, confidence), drift)


def drift_table(groups: Sequence[GroupDrift], certainty: float) -> Table:
    """One row a group: number of answers and mean confidence of reference and new, p-value, highest wealth and verdict."""
    table = Table(
        title="Confidences: number of answers and mean",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption_justify="left",
        caption=(
            f"Drift: the wealth, here at its highest, reached {1 / groups[0].error:.4g}. Without drift, this happens\n"
            f"anywhere with a probability of at most {1 - certainty:.3g}, however often one looks.\n"
            "The p-value is for a file that is looked at once."
        ),
    )
    table.add_column("answers", overflow="fold")
    for heading in ("reference", "new", "p-value", "wealth"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for group in groups:
        wealth = group.log10_wealth
        table.add_row(
            group.name,
            *(f"{len(a):,}  {_percent(a):>6}" for a in (group.reference, group.new)),
            "-" if group.p_value is None else f"{group.p_value:.4f}",
            _power_of_ten(float(wealth.max())) if len(wealth) else "-",
            group.verdict,
        )
    return table


def _mean(confidence: np.ndarray) -> float:
    """Mean of the parsed confidences; NaN if there are none."""
    parsed = confidence[~np.isnan(confidence)]
    return float(parsed.mean()) if len(parsed) else math.nan


def _json_mean(confidence: np.ndarray) -> float | None:
    return json_number("mean_confidence", _mean(confidence))


def _percent(confidence: np.ndarray) -> str:
    mean = _mean(confidence)
    return "-" if math.isnan(mean) else f"{mean:.1%}"


def _power_of_ten(exponent: float) -> str:
    return f"{10**exponent:.3g}" if exponent < 6 else f"1e{exponent:.0f}"


# --- Figure and curves ----------------------------------------------------------------------------------------------


def drift_figure(groups: Sequence[GroupDrift]) -> Figure:
    """Histograms of all confidences, reference and new; below, the wealth of each group over the answers with the alarm line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), dpi=100, layout="constrained")
    histogram, wealth = figure.subplots(2)
    _draw_histogram(histogram, groups[0])
    _draw_wealth(wealth, groups)
    return figure


def _draw_histogram(ax: Axes, overall: GroupDrift) -> None:
    edges = np.arange(-2.5, 103, 5)
    for answers, offset, colour, hatch, label in (
        (overall.reference, -1.1, BLUE, "", "Reference"),
        (overall.new, 1.1, ORANGE, "///", "New"),
    ):
        parsed = np.histogram(100 * answers[~np.isnan(answers)], edges)[0]
        x = np.append(UNPARSED_AT, (edges[1:] + edges[:-1]) / 2) + offset
        shares = 100 * np.append(np.isnan(answers).sum(), parsed) / len(answers)
        name = f"{label}: {len(answers):,}, mean {_percent(answers)}"
        ax.bar(x, shares, 2.2, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=name)
    ax.set_xticks([UNPARSED_AT, *range(0, 101, 20)], ["none", *map(str, range(0, 101, 20))])
    ax.set(xlabel="Confidence (%)", ylabel="Share of the answers (%)", title="Confidences, all answers")
    ax.legend(loc="best", frameon=False)


def _draw_wealth(ax: Axes, groups: Sequence[GroupDrift]) -> None:
    styles = ("-", "--", "-.", ":")
    for i, group in enumerate(groups):
        if group.drift is not None:
            style = styles[i % len(styles)]
            label = f"{group.name}: {group.verdict}"
            ax.plot(group.number, group.log10_wealth, style, linewidth=2.2 if i == 0 else 1.2, label=label)
    line = -math.log10(groups[0].error)
    ax.axhline(line, color=GREY, linestyle="--", linewidth=1.2, label=f"Alarm at {1 / groups[0].error:.4g}")
    ax.set(xlabel="New answer", ylabel="Wealth, log10", title="Evidence that the answers have changed")
    ax.grid(alpha=0.25)
    ax.legend(loc="best", frameon=False, fontsize="small")


def wealth_curves(groups: Sequence[GroupDrift]) -> Iterator[tuple[int, Mapping[str, float]]]:
    """Points of the curves of wealth: number of an answer, and for each group `log10_wealth/GROUP` after it, overall `log10_wealth`.

    There are at most `MAX_LOGGED` points, with those of the first and the last answer.
    """
    total = len(groups[0].new)
    names = ["log10_wealth", *(f"log10_wealth/{group.name}" for group in groups[1:])]
    wealth = [group.log10_wealth for group in groups]
    for number in np.unique(np.linspace(1, total, min(total, MAX_LOGGED)).round().astype(int)):
        seen = [int(np.searchsorted(group.number, number, side="right")) for group in groups]
        points = zip(names, wealth, seen, strict=True)
        yield int(number), {name: float(curve[n - 1]) for name, curve, n in points if n}
