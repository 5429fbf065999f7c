"""The report's first lines: what a model says, what is true, and whether it can be trusted, in plain words.

The verdict follows stated thresholds, which the page prints. They are ours: no paper has agreed on any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.metrics.figures import wilson_interval
from vlm_calibration.reporting.report_data import ORACLE, System
from vlm_calibration.reporting.report_table import Row
from vlm_calibration.reporting.tables import groups_of

Verdict = Literal["yes", "partly", "no"]
TRUSTED, ROUGH = (0.05, 0.70), (0.10, 0.60)
"""Largest ECE and smallest AUROC of a confidence that can be trusted, and of one that is roughly right."""
EDGES = (0, 20, 40, 60, 80, 90, 100)
"""In percent, of the bands that stated confidences are told in; a band holds its lower edge, the last one both."""
FEW = 30
"""Groups of fewer answers are not singled out."""
GROUPED = ("accuracy", "mean_confidence", "overconfidence", "ece", "auroc")
"""What is known of each group."""


class Band(NamedTuple):
    """Answers that state about the same: the edges, and what was said and what is true, all in percent."""

    low: int
    high: int
    said: float
    right: float
    right_low: float
    right_high: float
    answers: int

    @property
    def name(self) -> str:
        return f"{self.low}–{self.high if self.high == 100 else self.high - 1}%"


class Group(NamedTuple):
    """Answers of one category. metrics: by name, NaN where undefined."""

    name: str
    n: int
    metrics: Mapping[str, float]


class Summary(NamedTuple):
    """The system that the summary is about, the verdict on it, and the sentences that say why."""

    system: str
    verdict: Verdict
    headline: str
    sentences: list[str]
    bands: list[Band]


def subject_of(systems: Sequence[System]) -> System:
    """The system that a report is about: the last that was trained, or else the last."""
    return (
        [s for s in systems if s.name != ORACLE][-1]
        if any(s.name != ORACLE for s in systems)
        else systems[-1]
    )


def summarize_system(system: System, rows: Sequence[Row]) -> Summary:
    """The summary of one system, compared with the first one of the comparison."""
    stated = {row.system: row for row in rows if row.is_stated}
    row, base = stated[system.name], next(iter(stated.values()))
    verdict, bands = verdict_of(row), bands_of(system.predictions)
    sentences = [_overall(row)]
    if not math.isnan(row.metrics["auroc"].value):
        share = _percent(row.metrics["auroc"].value)
        sentences.append(
            f"Of a right and a wrong answer, it gives the right one the higher confidence {share} of the time "
            "(AUROC; 50% would be chance)."
        )
    if base is not row:
        sentences.append(_against(row, base))
    known = [
        g for g in groups_of_system(system) if g.n >= FEW and not math.isnan(g.metrics["overconfidence"])
    ]
    if known:
        worst = max(known, key=lambda g: abs(g.metrics["overconfidence"]))
        said, gap = worst.metrics["mean_confidence"], worst.metrics["overconfidence"]
        sentences.append(
            f"It is furthest off on “{worst.name}”: it says {_percent(said)} and is right "
            f"{_percent(said - gap)} of the time ({worst.n:,} answers)."
        )
    return Summary(system.name, verdict, _headline(bands), sentences, bands)


def verdict_of(row: Row) -> Verdict:
    """The verdict on a stated confidence, by the thresholds above."""
    ece, auroc = row.metrics["ece"].value, row.metrics["auroc"].value
    for verdict, (most, least) in (("yes", TRUSTED), ("partly", ROUGH)):
        # An AUROC is undefined where all answers are right, and then there is nothing to tell apart.
        if ece <= most and (math.isnan(auroc) or auroc >= least):
            return verdict  # type: ignore[return-value]
    return "no"


def bands_of(predictions: Sequence[EstimatedPrediction]) -> list[Band]:
    """The bands in which confidences were stated, the highest first."""
    read = [(100 * p.confidence, p.correct) for p in predictions if p.confidence is not None]
    found = []
    for low, high in pairwise(EDGES):
        part = [(c, r) for c, r in read if low <= round(c, 6) < high or c == high == 100]
        if not part:
            continue
        n, right = len(part), sum(r for _, r in part)
        bounds = wilson_interval(torch.tensor(float(right)).double(), torch.tensor(float(n)).double())
        below, above = (100 * float(b) for b in bounds)
        found.append(Band(low, high, sum(c for c, _ in part) / n, 100 * right / n, below, above, n))
    return found[::-1]


def groups_of_system(system: System) -> list[Group]:
    """The metrics of each group of categories, coarse groups first, empty without categories.

    A combination that holds the same answers as one of its parts is left out.
    """
    values = system.values
    names = groups_of({system.name: values})
    whole = [
        n
        for n in names
        if values[f"n/{n}"] not in [values[f"n/{part}"] for part in n.split("/") if part != n]
    ]
    return [
        Group(name, int(values[f"n/{name}"]), {metric: values[f"{metric}/{name}"] for metric in GROUPED})
        for name in whole
    ]


def _headline(bands: Sequence[Band]) -> str:
    if not bands:
        return "It states no confidence that could be read."
    most = max(bands, key=lambda band: band.answers)
    return (
        f"When it says {most.name}, on average {most.said:.0f}%, it is right {most.right:.0f}% of the time."
    )


def _overall(row: Row) -> str:
    unparsed = row.metrics["parse_failure_rate"].value
    if unparsed == 1:
        return f"None of its {row.n:,} answers states a confidence that could be read."
    said, gap = row.metrics["mean_confidence"].value, row.metrics["overconfidence"].value
    missing = (
        f" {round(unparsed * row.n):,} of the answers state none that could be read." if unparsed else ""
    )
    return (
        f"Over {row.n:,} answers it says {_percent(said)} on average and is right {_percent(said - gap)} of the time; "
        f"what it says and what is true differ by {100 * row.metrics['ece'].value:.1f} points on average (ECE).{missing}"
    )


def _against(row: Row, base: Row) -> str:
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
