"""Where stated confidence and accuracy agree: ranges of stated confidence, and groups of answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.metrics.figures import wilson_interval
from vlm_calibration.reporting.report.data import System, summarize_predictions
from vlm_calibration.reporting.tables import groups_of

EDGES = (0, 20, 40, 60, 80, 90, 100)
"""Edges of the bands of stated confidence, in percent; a band includes its lower edge, the last band both."""
TOLERANCE = 5
"""Points of percent by which stated confidence and accuracy may differ, however many answers show it."""
GROUPED = ("accuracy", "mean_confidence", "overconfidence", "parse_failure_rate", "ece", "auroc")
"""Metrics of each group."""
TYPES = {"yes_no": "yes-or-no answers", "short": "short answers", "open": "open answers"}
"""Answer type -> the name of its group."""


class Match(NamedTuple):
    """Stated confidence beside accuracy, over answers whose confidence was parsed; all shares in percent.

    Attributes:
        says: mean stated confidence; NaN without answers, as the next three.
        right: share of correct answers.
        low: lower end of its 95% Wilson interval.
        high: upper end of its 95% Wilson interval.
        answers: number of answers.
    """

    says: float
    right: float
    low: float
    high: float
    answers: int

    @property
    def agrees(self) -> bool:
        """Whether both differ by at most `TOLERANCE`, or the stated confidence is in the interval of the accuracy."""
        return abs(self.says - self.right) <= TOLERANCE + 1e-9 or self.low <= self.says <= self.high

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


def match_of(says: float, correct: float, answers: int) -> Match:
    """Put a mean stated confidence beside an accuracy.

    Args:
        says: mean stated confidence in [0, 1].
        correct: number of correct answers.
        answers: number of answers.
    """
    if not answers:
        return Match(math.nan, math.nan, math.nan, math.nan, 0)
    low, high = wilson_interval(torch.tensor(float(correct)).double(), torch.tensor(float(answers)).double())
    return Match(100 * says, 100 * correct / answers, 100 * float(low), 100 * float(high), answers)


def bands_of(predictions: Sequence[EstimatedPrediction]) -> list[Band]:
    """The bands that contain answers, the highest first."""
    rows = [(100 * p.confidence, p.correct) for p in predictions if p.confidence is not None]
    bands = []
    for low, high in pairwise(EDGES):
        members = [(c, r) for c, r in rows if low <= round(c, 6) < high or c == high == 100]
        if members:
            n = len(members)
            says = sum(c for c, _ in members) / n / 100
            bands.append(Band(low, high, match_of(says, sum(r for _, r in members), n)))
    return bands[::-1]


def groups_of_system(system: System) -> list[Group]:
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
    return [
        *_type_groups(system.predictions),
        *(_group(name, {m: values[f"{m}/{name}"] for m in ("n", *GROUPED)}) for name in distinct),
    ]


def _type_groups(predictions: Sequence[EstimatedPrediction]) -> list[Group]:
    """A group for each answer type, none if all answers are of one type."""
    types = [t for t in TYPES if any(p.answer_type == t for p in predictions)]
    if len(types) < 2:
        return []
    return [
        _group(TYPES[t], summarize_predictions([p for p in predictions if p.answer_type == t])) for t in types
    ]


def _group(name: str, values: Mapping[str, float]) -> Group:
    n, says = int(values["n"]), values["mean_confidence"]
    parsed = round(n * (1 - values["parse_failure_rate"]))
    correct = round(parsed * (says - values["overconfidence"])) if parsed else 0
    return Group(name, n, {metric: values[metric] for metric in GROUPED}, match_of(says, correct, parsed))
