"""Where stated confidence and accuracy agree: ranges of stated confidence, and groups of answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.metrics.figures import wilson_interval
from vlm_calibration.records import category_groups
from vlm_calibration.reporting.report.bootstrap import ImageBootstrap
from vlm_calibration.reporting.report.data import System, summarize_predictions
from vlm_calibration.reporting.tables import groups_of

EDGES = (0, 20, 40, 60, 80, 90, 100)
"""Edges of the bands of stated confidence, in percent; a band includes its lower edge, the last band both."""
TOLERANCE = 5
"""Points of percent by which stated confidence and accuracy may differ."""
GROUPED = ("accuracy", "mean_confidence", "overconfidence", "parse_failure_rate", "ece", "auroc")
"""Metrics of each group."""
TYPES = {"yes_no": "yes-or-no answers", "short": "short answers", "open": "open answers"}
"""Answer type -> the name of its group."""


class Match(NamedTuple):
    """Stated confidence beside accuracy, over answers whose confidence was parsed; all shares in percent.

    Attributes:
        says: mean stated confidence; NaN without answers, as the next three.
        right: share of correct answers.
        low: lower end of its 95% interval: over images, for the given `says`, and at least the Wilson interval of independent answers,
            which stays wide where all answers are correct.
        high: upper end of this interval.
        answers: number of answers.
    """

    says: float
    right: float
    low: float
    high: float
    answers: int

    @property
    def agrees(self) -> bool | None:
        """Whether both differ by at most `TOLERANCE`; None where the interval leaves it open."""
        least, most = self.says - TOLERANCE - 1e-9, self.says + TOLERANCE + 1e-9
        return told(least <= self.low and self.high <= most, self.high < least or self.low > most)

    @property
    def agreement(self) -> str:
        """`agrees` as a word."""
        return {True: "yes", False: "no", None: "unclear"}[self.agrees]

    @property
    def numbers(self) -> str:
        """Both in words: "says 80%, is right 65%"."""
        return f"says {self.says:.0f}%, is right {self.right:.0f}%"


class Band(NamedTuple):
    """Answers with about the same stated confidence.

    Attributes:
        low: lower edge, in percent.
        high: upper edge, in percent.
        match: what they state, and how many are correct.
    """

    low: int
    high: int
    match: Match

    @property
    def name(self) -> str:
        return f"{self.low}–{self.high if self.high == 100 else self.high - 1}%"


class Group(NamedTuple):
    """Answers of one category, part of a category, or answer type.

    Attributes:
        name: of the category, or of the answer type (`TYPES`).
        n: number of answers.
        metrics: name -> value, NaN if undefined.
        match: what they state, and how many are correct.
    """

    name: str
    n: int
    metrics: Mapping[str, float]
    match: Match


def told(holds: bool, fails: bool) -> bool | None:
    """Whether something holds; None if neither it nor its opposite is certain."""
    return True if holds else False if fails else None


def match_of(
    predictions: Sequence[EstimatedPrediction],
    bootstrap: ImageBootstrap,
    belongs: Callable[[EstimatedPrediction], bool],
) -> Match:
    """Put the mean stated confidence of some answers beside their accuracy.

    Args:
        predictions: all answers of a system.
        bootstrap: draws of the images behind them.
        belongs: chooses the answers, among those that state a confidence.
    """
    gaps = [
        p.confidence - p.correct if p.confidence is not None and belongs(p) else None for p in predictions
    ]
    correct = [p.correct for p, gap in zip(predictions, gaps, strict=True) if gap is not None]
    if not correct:
        return Match(math.nan, math.nan, math.nan, math.nan, 0)
    n, right, gap = len(correct), sum(correct) / len(correct), bootstrap.mean(gaps)
    says = right + gap.value
    low, high = map(float, wilson_interval(torch.tensor(float(sum(correct))), torch.tensor(float(n))))
    low, high = max(0.0, min(low, says - gap.high)), min(1.0, max(high, says - gap.low))
    return Match(100 * says, 100 * right, 100 * low, 100 * high, n)


def bands_of(predictions: Sequence[EstimatedPrediction], bootstrap: ImageBootstrap) -> list[Band]:
    """The bands that contain answers, the highest first."""
    bands = []
    for low, high in pairwise(EDGES):

        def belongs(prediction: EstimatedPrediction, low: int = low, high: int = high) -> bool:
            percent = round(100 * (prediction.confidence or 0.0), 6)
            return low <= percent < high or percent == high == 100

        bands.append(Band(low, high, match_of(predictions, bootstrap, belongs)))
    return [band for band in bands[::-1] if band.match.answers]


def groups_of_system(system: System, bootstrap: ImageBootstrap) -> list[Group]:
    """The groups of a system's answers: categories, coarse ones first, and answer types if there are several.

    A combination that has as many answers as one of its parts is omitted.
    """
    values = system.values
    names = groups_of({system.name: values})
    distinct = [
        n
        for n in names
        if values[f"n/{n}"] not in [values[f"n/{part}"] for part in n.split("/") if part != n]
    ]
    predictions = system.predictions
    groups = []
    types = [t for t in TYPES if any(p.answer_type == t for p in predictions)]
    for kind in types if len(types) > 1 else ():
        own = summarize_predictions([p for p in predictions if p.answer_type == kind])
        match = match_of(predictions, bootstrap, lambda p, kind=kind: p.answer_type == kind)  # type: ignore[misc]
        groups.append(Group(TYPES[kind], int(own["n"]), {m: own[m] for m in GROUPED}, match))
    for name in distinct:
        match = match_of(predictions, bootstrap, lambda p, name=name: name in category_groups(p.category))  # type: ignore[misc]
        metrics = {m: values[f"{m}/{name}"] for m in GROUPED}
        groups.append(Group(name, int(values[f"n/{name}"]), metrics, match))
    return groups
