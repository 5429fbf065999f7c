"""The comparison of all systems as one frame: every confidence with intervals and p-values, and the stated one in groups and bands.

Intervals come from a bootstrap over images: answers about one image are correlated, so images are drawn with replacement, each with all
its answers. Systems that answered the same questions are measured on the same draws, which pairs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from scipy.stats import binomtest
from torch import Tensor

from vlm_calibration.estimators.predictions import EXPECTED, estimators_of
from vlm_calibration.estimators.recalibration import METHODS, recalibrated, unrated_types
from vlm_calibration.estimators.teacher import TEACHER, taught_confidences
from vlm_calibration.metrics.bootstrap import Interval, bootstrap_replicates, interval_of, percentile_interval
from vlm_calibration.metrics.functional import METRICS, REPORTED
from vlm_calibration.metrics.table import ConfidenceTable
from vlm_calibration.progress import track
from vlm_calibration.records import VERBALIZED, Prediction, category_groups
from vlm_calibration.reporting.report.data import ORACLE, Answers, System, metrics_of
from vlm_calibration.reporting.tables import COLUMNS as HEADLINE

RAW = "raw"
ALL, GROUP, BAND, DISTANCE = "all", "group", "band", "distance"
"""Kinds of rows: all answers of a system, those of a category, part of a category or answer type, those of a range of confidence, and
the stated confidence of a system less another one in the same answers, or in the first system's."""
MEASURED = ("accuracy", *(name for name in REPORTED if name != "n"))
"""Metrics of every confidence: the accuracy over all answers, and the calibration metrics of `metrics.json`."""
ENDS = ("", "_low", "_high", "_p")  # of the columns of a metric: its value, 95% interval and p-value
KEYS = ("system", "estimator", "recalibration", "kind", "group")
MATCH = ("parsed", "says", "is_right", "is_right_low", "is_right_high", "agrees")
COLUMNS = (
    *(*KEYS, "n", "parsed", "forward_passes"),
    *(f"{name}{end}" for name in MEASURED for end in ENDS),
    *MATCH[1:],
)
"""The columns of the frame. Shares are in [0, 1]; what is undefined or does not apply to a kind of row is NaN.

`forward_passes` are those for each query. Each metric has its 95% interval, and the p-value of its difference from the first row. `says`
is the mean stated confidence of the answers whose confidence was parsed, `is_right` the share of these that are correct, with its 95%
interval; `agrees` is "yes", "no" or "unclear", see `agreement`."""
LIKELIHOOD = ("likelihood", "platt")
"""Estimator and recalibration of the first system that stated confidence is compared with: the baseline that needs token probabilities."""
EDGES = (0, 20, 40, 60, 80, 90, 100)
"""Edges of the bands of stated confidence, in percent; a band includes its lower edge, the last band both."""
TOLERANCE = 0.05  # the difference between stated confidence and accuracy that is small enough
GROUPED = ("accuracy", "mean_confidence", "overconfidence", "parse_failure_rate", "ece", "auroc")
TYPES = {"yes_no": "yes-or-no answers", "short": "short answers", "open": "open answers"}


class Measured(NamedTuple):
    """The interval of each metric of one confidence, NaN if undefined, and its value in each draw of images, float64 [B]."""

    intervals: Mapping[str, Interval]
    drawn: Mapping[str, Tensor]


def p_value(first: Measured, second: Measured, name: str) -> float:
    """Two-sided p-value of the difference in a metric between two confidences that were measured on the same draws.

    The share of draws whose difference is as far from the observed one as that is from 0 (Hall & Wilson, 1991); at least
    1 / (draws + 1), NaN if a metric is undefined.
    """
    observed = first.intervals[name].value - second.intervals[name].value
    deviations = (first.drawn[name] - second.drawn[name] - observed).abs()
    deviations = deviations[~deviations.isnan()]
    if observed != observed or len(deviations) == 0:
        return float("nan")
    return (1 + int((deviations >= abs(observed) - 1e-12).sum())) / (1 + len(deviations))


class ImageBootstrap:
    """B draws of the images behind some answers, a function of the seed and the images' names; an unnamed image is one of its own."""

    def __init__(self, predictions: Answers, replicates: int = 1000, seed: int = 0) -> None:
        units = [("id", p.id) if p.image is None else ("image", p.image) for p in predictions]
        index = {unit: i for i, unit in enumerate(sorted(set(units)))}
        n = len(index)
        self.correct = np.array([p.correct for p in predictions])
        self.unit_of = np.array([index[unit] for unit in units])  # number of each answer's image, int [N]
        self.weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates).T
        """How often each draw contains each image, int [images, B]."""
        self.rarer = min(len(np.unique(self.unit_of[self.correct == kind])) for kind in (True, False))
        """Number of images with a correct answer, or with a wrong one, whichever is smaller."""

    def measure(self, confidence: Sequence[float | None]) -> Measured:
        """Measure one confidence in each of the answers; None counts as unparsed."""
        values = np.array([np.nan if c is None else c for c in confidence], dtype=np.float64)
        correct = torch.from_numpy(self.correct)
        table = ConfidenceTable.from_predictions(torch.from_numpy(values), correct, None)
        # The cell of each answer: two for each level, wrong and correct, and one for unparsed answers.
        cell = 2 * np.searchsorted(table.value.numpy(), values) + self.correct
        cell[np.isnan(values)] = 2 * len(table.value)
        shape = (2 * len(table.value) + 1, len(self.weights))
        per_unit = csr_matrix((np.ones(len(values), dtype=np.int64), (cell, self.unit_of)), shape=shape)
        counts = torch.from_numpy(np.ascontiguousarray((per_unit @ self.weights).T))
        drawn = table._replace(counts=counts[:, :-1].reshape(len(counts), -1, 2), unparsed=counts[:, -1])
        accuracy = self._drawn_sums(self.correct) / self._drawn_sums(np.ones(len(self.correct)))
        of_draws = {"accuracy": torch.from_numpy(accuracy)}
        value = float(self.correct.mean())
        intervals = {"accuracy": percentile_interval(value, of_draws["accuracy"], self.rarer)}
        for name in MEASURED[1:]:
            of_draws[name] = bootstrap_replicates(drawn, METRICS[name])
            intervals[name] = interval_of(METRICS[name], table, drawn, of_draws[name], self.rarer)
        return Measured(intervals, of_draws)

    def mean(self, values: Sequence[float | None]) -> Interval:
        """The mean of one number for each answer with its 95% interval; None is left out, and there is at least one number."""
        used = np.array([value is not None for value in values])
        numbers = np.array([0.0 if value is None else value for value in values])
        drawn = self._drawn_sums(used)
        means = torch.from_numpy(self._drawn_sums(numbers) / np.where(drawn > 0, drawn, np.nan))
        return percentile_interval(float(numbers[used].mean()), means, len(np.unique(self.unit_of[used])))

    def _drawn_sums(self, numbers: np.ndarray) -> np.ndarray:
        """The sum of one number for each answer in each draw, float64 [B]."""
        of_units = np.bincount(self.unit_of, weights=numbers.astype(np.float64), minlength=len(self.weights))
        return of_units @ self.weights


def compare(
    systems: Sequence[System], replicates: int = 1000, seed: int = 0
) -> tuple[pd.DataFrame, list[str]]:
    """Measure every confidence of every system with a number of bootstrap draws, and compare it with the first system's stated one.

    The frame has `COLUMNS`: the confidences of all systems, the stated one of each first; then for each system its groups, and its bands
    from the highest down, and its distances to `EXPECTED`, `TEACHER` and the first system's `LIKELIHOOD`. Also why recalibrated confidences are missing.
    """
    rows: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    notes: list[str] = []
    base: Measured | None = None
    known: dict[tuple[str, str, str], Measured] = {}
    for system in systems:
        bootstrap = ImageBootstrap(system.predictions, replicates, seed)
        rated = list(_confidences(system, notes))
        name = f"bootstrap intervals of {system.name}"
        for estimator, method, confidences in track(rated, name, len(rated), "confidences"):
            measured = known[system.name, estimator, method] = bootstrap.measure(confidences)
            base = base or measured
            row: dict[str, Any] = dict(zip(KEYS, (system.name, estimator, method, ALL, ""), strict=True))
            row |= {"n": len(confidences), "parsed": len(confidences) - confidences.count(None)}
            if method == RAW:
                row["forward_passes"] = system.metrics.get(f"forward_passes@{estimator}")
            for metric, interval in measured.intervals.items():
                p = math.nan if measured is base else p_value(measured, base, metric)
                row |= _columns(metric, interval, p)
            rows.append(row)
        keys = {"system": system.name, "estimator": VERBALIZED, "recalibration": RAW}
        parts += [keys | part for part in (*groups_of(system, bootstrap), *bands_of(system, bootstrap))]
        compared = ((system.name, EXPECTED, RAW), (system.name, TEACHER, RAW), (systems[0].name, *LIKELIHOOD))
        stated = known[system.name, VERBALIZED, RAW]
        parsed = sum(p.confidence is not None for p in system.predictions)
        whole = {**keys, "kind": DISTANCE, "n": len(system.predictions), "parsed": parsed}
        for other in compared if system.name != ORACLE else ():
            if other in known:
                name = ", ".join(word for word in other if word != RAW)
                parts.append({**whole, "group": name, **_distance(stated, known[other], bootstrap.rarer)})
    return pd.DataFrame(rows + parts, columns=COLUMNS), notes


def _confidences(system: System, notes: list[str]) -> Iterator[tuple[str, str, list[float | None]]]:
    """Estimator, recalibration and confidences of each row of a system; appends to `notes` what cannot be recalibrated, and why."""
    for estimator in estimators_of(system.predictions):
        yield estimator, RAW, [p.confidence_of(estimator) for p in system.predictions]
        if system.name == ORACLE:  # calibrated by construction
            continue
        if system.calibration is None:
            reason = "there are no answers to a calibration set (data.calibration of the evaluation, or --calibration)"
        elif estimator not in estimators_of(system.calibration):
            reason = "the calibration set lacks it"
        elif missing := unrated_types(system.predictions, estimator, system.calibration):
            reason = f"no {' and no '.join(missing)} answer of the calibration set has it"
        else:
            for method in METHODS:
                values = recalibrated(method, system.predictions, estimator, system.calibration)
                yield estimator, method, values
            continue
        notes.append(f"{system.name}: {estimator} is not recalibrated: {reason}.")
    if taught := taught_confidences(system.predictions, system.calibration or ()):
        yield TEACHER, RAW, taught


def _distance(stated: Measured, other: Measured, rarer: int) -> dict[str, float]:
    """The Brier score and AUROC of one confidence less those of another, with 95% intervals over the same draws, and p-values."""
    row: dict[str, float] = {}
    for name in ("brier", "auroc"):
        difference = stated.intervals[name].value - other.intervals[name].value
        if difference == difference:
            interval = percentile_interval(difference, stated.drawn[name] - other.drawn[name], rarer)
            row |= _columns(name, interval, p_value(stated, other, name))
    return row


def _columns(name: str, interval: Interval, p: float) -> dict[str, float]:
    return dict(zip((f"{name}{end}" for end in ENDS), (*interval, p), strict=True))


def plain_rows(systems: Sequence[System]) -> pd.DataFrame:
    """The rows of `compare` but bands and recalibrated confidences: `KEYS`, `n` and the headline metrics, None where undefined."""
    # One draw, since intervals are left out.
    frame, _ = compare([replace(system, calibration=None) for system in systems], replicates=1)
    rows = frame.loc[frame.kind.isin((ALL, GROUP)), [*KEYS, "n", *HEADLINE]]
    return rows.astype(object).where(rows.notna(), None)


def stated_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the stated confidence in all answers of each system."""
    return frame[(frame.kind == ALL) & (frame.estimator == VERBALIZED) & (frame.recalibration == RAW)]


def parts_of_system(frame: pd.DataFrame, system: str, *kinds: str) -> pd.DataFrame:
    return frame[(frame.system == system) & frame.kind.isin(kinds)]


def confidence_name(system: str, estimator: str) -> str:
    return system if estimator == VERBALIZED else f"{system}, {estimator}"


def agreement(says: float, low: float, high: float) -> str:
    """Whether an interval of the accuracy is within `TOLERANCE` of the stated confidence: "yes", "no", or "unclear" if it is in part."""
    least, most = says - TOLERANCE - 1e-11, says + TOLERANCE + 1e-11
    return "yes" if least <= low and high <= most else "no" if high < least or low > most else "unclear"


def match_of(system: System, bootstrap: ImageBootstrap, belongs: Sequence[bool]) -> dict[str, Any]:
    """The columns `parsed` and, if there are any such answers, `says` to `agrees` of the answers that belong to a row.

    The interval is over images, and at least the Wilson interval, which stays wide where all are correct.
    """
    pairs = zip(system.predictions, belongs, strict=True)
    gaps = [p.confidence - p.correct if p.confidence is not None and of_row else None for p, of_row in pairs]
    correct = [p.correct for p, gap in zip(system.predictions, gaps, strict=True) if gap is not None]
    if not correct:
        return {"parsed": 0}
    n, right, gap = len(correct), sum(correct) / len(correct), bootstrap.mean(gaps)
    says = right + gap.value
    low, high = binomtest(sum(correct), n).proportion_ci(method="wilson")
    low, high = max(0.0, min(low, says - gap.high)), min(1.0, max(high, says - gap.low))
    return dict(zip(MATCH, (n, says, right, low, high, agreement(says, low, high)), strict=True))


def bands_of(system: System, bootstrap: ImageBootstrap) -> list[dict[str, Any]]:
    """The rows of the bands that contain answers, the highest first."""
    percents = [None if p.confidence is None else round(100 * p.confidence, 6) for p in system.predictions]
    bands = []
    for low, high in list(pairwise(EDGES))[::-1]:
        belongs = [p is not None and (low <= p < high or p == high == 100) for p in percents]
        if any(belongs):
            name = f"{low}–{high if high == 100 else high - 1}%"
            match = match_of(system, bootstrap, belongs)
            bands.append({"kind": BAND, "group": name, "n": match["parsed"], **match})
    return bands


def groups_of(system: System, bootstrap: ImageBootstrap) -> list[dict[str, Any]]:
    """The rows of a system's groups: answer types if there are several, parts of categories, and pairs that are smaller than both parts."""
    by_type: dict[str, list[Prediction]] = {name: [] for name in TYPES.values()}
    by_category: dict[str, list[Prediction]] = {}
    for prediction in system.predictions:
        by_type[TYPES[prediction.answer_type]].append(prediction)
        parts = category_groups(prediction.category)
        for name in (*parts, *map("/".join, combinations(parts, 2))):
            by_category.setdefault(name, []).append(prediction)
    members_of = {name: members for name, members in by_type.items() if members}
    members_of = members_of if len(members_of) > 1 else {}
    for name, members in sorted(by_category.items(), key=lambda item: (item[0].count("/"), item[0])):
        if "/" not in name or len(members) not in [len(by_category[part]) for part in name.split("/")]:
            members_of[name] = members
    groups = []
    for name, members in members_of.items():
        ids, metrics = {p.id for p in members}, metrics_of(members)
        match = match_of(system, bootstrap, [p.id in ids for p in system.predictions])
        values = {metric: metrics[metric] for metric in GROUPED}
        groups.append({"kind": GROUP, "group": name, "n": len(members), **match, **values})
    return groups
