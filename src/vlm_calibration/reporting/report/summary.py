"""The summary at the top of the report: a verdict on the stated confidence, and the sentences that explain it.

The verdict follows thresholds that the page prints. They are this project's choice; there are no established ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.metrics.figures import wilson_interval
from vlm_calibration.reporting.report.data import ORACLE, System
from vlm_calibration.reporting.report.table import Row
from vlm_calibration.reporting.tables import groups_of

Verdict = Literal["yes", "partly", "no"]
TRUSTED, ROUGH = (0.05, 0.70), (0.10, 0.60)
"""Largest ECE and smallest AUROC of a confidence that can be trusted, and of one that can be trusted roughly."""
EDGES = (0, 20, 40, 60, 80, 90, 100)
"""Edges of the bands of stated confidence, in percent; a band includes its lower edge, the last band both."""
MIN_ANSWERS = 30
"""Smallest group of answers that the summary may name."""
GROUPED = ("accuracy", "mean_confidence", "overconfidence", "ece", "auroc")
"""Metrics of each group."""


class Band(NamedTuple):
    """Answers with about the same stated confidence; all shares in percent.

    Attributes:
        low: lower edge.
        high: upper edge.
        confidence: mean stated confidence.
        accuracy: share of correct answers.
        accuracy_low: lower end of its 95% interval.
        accuracy_high: upper end of its 95% interval.
        answers: number of answers.
    """

    low: int
    high: int
    confidence: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    answers: int

    @property
    def name(self) -> str:
        return f"{self.low}–{self.high if self.high == 100 else self.high - 1}%"


class Group(NamedTuple):
    """Answers of one category.

    Attributes:
        name: of the category.
        n: number of answers.
        metrics: name -> value, NaN if undefined.
    """

    name: str
    n: int
    metrics: Mapping[str, float]


class Summary(NamedTuple):
    """The summary of a report.

    Attributes:
        system: name of the system that it describes.
        verdict: whether its stated confidence can be trusted.
        headline: one sentence on the most frequent band.
        sentences: the sentences below it.
        bands: bands of stated confidence, the highest first.
    """

    system: str
    verdict: Verdict
    headline: str
    sentences: list[str]
    bands: list[Band]


def subject_of(systems: Sequence[System]) -> System:
    """The system that a report describes by default: the last one that is not the oracle."""
    return ([s for s in systems if s.name != ORACLE] or list(systems))[-1]


def summarize_system(system: System, rows: Sequence[Row]) -> Summary:
    """Summarise one system and compare it with the first one."""
    stated = {row.system: row for row in rows if row.is_stated}
    row, base = stated[system.name], next(iter(stated.values()))
    verdict, bands = verdict_of(row), bands_of(system.predictions)
    sentences = [_overall(row)]
    if not math.isnan(row.metrics["auroc"].value):
        share = _percent(row.metrics["auroc"].value)
        sentences.append(
            f"Of a correct and a wrong answer, the correct one has the higher confidence {share} of the time "
            "(AUROC; 50% is chance)."
        )
    if base is not row:
        sentences.append(_compared_with(row, base))
    if worst := largest_error(system):
        sentences.append(f"Its {worst}")
    return Summary(system.name, verdict, _headline(bands), sentences, bands)


def largest_error(system: System) -> str:
    """The group whose stated confidence and accuracy differ most, in words; empty without a group of `MIN_ANSWERS`."""
    groups = [
        g
        for g in groups_of_system(system)
        if g.n >= MIN_ANSWERS and not math.isnan(g.metrics["overconfidence"])
    ]
    if not groups:
        return ""
    worst = max(groups, key=lambda g: abs(g.metrics["overconfidence"]))
    confidence, gap = worst.metrics["mean_confidence"], worst.metrics["overconfidence"]
    return (
        f"largest error is on “{worst.name}”: it says {_percent(confidence)} and is right "
        f"{_percent(confidence - gap)} of the time ({worst.n:,} answers)."
    )


def verdict_of(row: Row) -> Verdict:
    """Judge a stated confidence by `TRUSTED` and `ROUGH`."""
    ece, auroc = row.metrics["ece"].value, row.metrics["auroc"].value
    for verdict, (max_ece, min_auroc) in (("yes", TRUSTED), ("partly", ROUGH)):
        # The AUROC is undefined if all answers are correct, and then there is nothing to rank.
        if ece <= max_ece and (math.isnan(auroc) or auroc >= min_auroc):
            return verdict  # type: ignore[return-value]
    return "no"


def bands_of(predictions: Sequence[EstimatedPrediction]) -> list[Band]:
    """The bands that contain answers, the highest first."""
    rows = [(100 * p.confidence, p.correct) for p in predictions if p.confidence is not None]
    bands = []
    for low, high in pairwise(EDGES):
        members = [(c, r) for c, r in rows if low <= round(c, 6) < high or c == high == 100]
        if not members:
            continue
        n, correct = len(members), sum(r for _, r in members)
        bounds = wilson_interval(torch.tensor(float(correct)).double(), torch.tensor(float(n)).double())
        below, above = (100 * float(b) for b in bounds)
        bands.append(Band(low, high, sum(c for c, _ in members) / n, 100 * correct / n, below, above, n))
    return bands[::-1]


def groups_of_system(system: System) -> list[Group]:
    """The metrics of each group of categories, coarse groups first; empty without categories.

    A combination that has as many answers as one of its parts is omitted.
    """
    values = system.values
    names = groups_of({system.name: values})
    distinct = [
        n
        for n in names
        if values[f"n/{n}"] not in [values[f"n/{part}"] for part in n.split("/") if part != n]
    ]
    return [
        Group(name, int(values[f"n/{name}"]), {metric: values[f"{metric}/{name}"] for metric in GROUPED})
        for name in distinct
    ]


def _headline(bands: Sequence[Band]) -> str:
    if not bands:
        return "None of its answers states a confidence that could be parsed."
    band = max(bands, key=lambda band: band.answers)
    return f"When it says {band.name}, on average {band.confidence:.0f}%, it is right {band.accuracy:.0f}% of the time."


def _overall(row: Row) -> str:
    unparsed = row.metrics["parse_failure_rate"].value
    if unparsed == 1:
        return f"None of its {row.n:,} answers states a confidence that could be parsed."
    confidence, gap = row.metrics["mean_confidence"].value, row.metrics["overconfidence"].value
    missing = (
        f" {round(unparsed * row.n):,} of the answers state none that could be parsed." if unparsed else ""
    )
    return (
        f"Over {row.n:,} answers it says {_percent(confidence)} on average and is right {_percent(confidence - gap)} of the time; "
        f"stated confidence and accuracy differ by {100 * row.metrics['ece'].value:.1f} points on average (ECE).{missing}"
    )


def _compared_with(row: Row, base: Row) -> str:
    was, now, p = base.metrics["ece"].value, row.metrics["ece"].value, row.p["ece"]
    chance = "" if p is None or math.isnan(p) else f", {_chance(p)}"
    return (
        f"“{base.system}” says {_percent(base.metrics['mean_confidence'].value)} on average, is right "
        f"{_percent(base.metrics['accuracy'].value)} of the time and is off by {100 * was:.1f} points: the error is "
        f"{_change(was, now)}{chance}."
    )


def _chance(p: float) -> str:
    return f"which is {'more than chance' if p < 0.05 else 'within chance'} (p = {p:.3f})"


def _change(was: float, now: float) -> str:
    if math.isnan(was) or math.isnan(now) or was == 0:
        return "not comparable"
    return f"{_percent(abs(1 - now / was))} {'smaller' if now < was else 'larger'}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}%"
