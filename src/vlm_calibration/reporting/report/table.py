"""The comparison of all systems: every confidence with intervals and p-values, and where stated confidence and accuracy agree.

It is written as CSV beside the page.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from vlm_calibration.estimators.predictions import VERBALIZED, EstimatedPrediction, estimators_of
from vlm_calibration.estimators.recalibration import METHODS, recalibrated, unrated_types
from vlm_calibration.files import write_text
from vlm_calibration.metrics.bootstrap import Interval
from vlm_calibration.metrics.figures import wilson_interval
from vlm_calibration.progress import track
from vlm_calibration.records import category_groups
from vlm_calibration.reporting.report.bootstrap import MEASURED, ImageBootstrap, Measured, p_value
from vlm_calibration.reporting.report.data import ORACLE, System, metrics_of

RAW = "raw"
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
        if least <= self.low and self.high <= most:
            return True
        return False if self.high < least or self.low > most else None

    @property
    def agreement(self) -> str:
        """`agrees` as a word."""
        return {True: "yes", False: "no", None: "unclear"}[self.agrees]

    @property
    def numbers(self) -> str:
        """Both in words: "says 80%, is right 65%"."""
        return f"says {self.says:.0f}%, is right {self.right:.0f}%"


class Group(NamedTuple):
    """Answers of one category, part of a category, answer type or range of stated confidence (a band).

    Attributes:
        name: of the group.
        n: number of answers.
        match: what they state, and how many are correct.
        metrics: name -> value, NaN if undefined; empty for a band.
    """

    name: str
    n: int
    match: Match
    metrics: Mapping[str, float] = {}


class Row(NamedTuple):
    """One confidence in the answers of one system.

    Attributes:
        system: name of the system.
        estimator: estimator of the confidence.
        recalibration: method, or `RAW`.
        n: number of answers.
        metrics: name -> value with its 95% interval, NaN if undefined.
        difference: name -> value minus that of the first system's stated confidence.
        p: name -> p-value of the difference, None in the row that all others are compared with.
        passes: forward passes for each query, None if they were not counted.
    """

    system: str
    estimator: str
    recalibration: str
    n: int
    metrics: Mapping[str, Interval]
    difference: Mapping[str, float]
    p: Mapping[str, float | None]
    passes: float | None


def confidence_name(system: str, estimator: str) -> str:
    """The name of a system, with the estimator if it is not the stated confidence."""
    return system if estimator == VERBALIZED else f"{system}, {estimator}"


class Compared(NamedTuple):
    """The comparison.

    Attributes:
        rows: rows of every system, its stated confidence first.
        notes: why rows are missing.
        bands: system -> its bands of stated confidence, the highest first.
        groups: system -> its groups of answers.
    """

    rows: list[Row]
    notes: list[str]
    bands: Mapping[str, Sequence[Group]]
    groups: Mapping[str, Sequence[Group]]


def compare(systems: Sequence[System], replicates: int = 1000, seed: int = 0) -> Compared:
    """Measure every confidence of every system, and compare it with the stated confidence of the first system.

    Args:
        systems: the systems.
        replicates: number of bootstrap draws.
        seed: seed of the draws.
    """
    rows: list[Row] = []
    notes: list[str] = []
    bands: dict[str, Sequence[Group]] = {}
    groups: dict[str, Sequence[Group]] = {}
    base: Measured | None = None
    planned = [(system, *pair) for system in systems for pair in _planned(system, notes)]
    bootstraps: dict[str, ImageBootstrap] = {}
    for system, estimator, method in track(planned, "bootstrap intervals", len(planned), "confidences"):
        if system.name not in bootstraps:
            # One at a time, since the draws of many images take memory.
            bootstrap = ImageBootstrap(system.predictions, replicates, seed)
            bootstraps = {system.name: bootstrap}
            bands[system.name] = bands_of(system.predictions, bootstrap)
            groups[system.name] = groups_of_system(system, bootstrap)
        confidences = [p.confidence_of(estimator) for p in system.predictions]
        if method != RAW:
            assert system.calibration is not None
            confidences = recalibrated(method, system.predictions, estimator, system.calibration)
        measured = bootstraps[system.name].measure(confidences)
        base = base or measured
        passes = system.metrics.get(f"forward_passes@{estimator}") if method == RAW else None
        rows.append(
            Row(
                system.name,
                estimator,
                method,
                len(system.predictions),
                measured.intervals,
                {m: measured.intervals[m].value - base.intervals[m].value for m in MEASURED},
                {m: None if measured is base else p_value(measured, base, m) for m in MEASURED},
                passes,
            )
        )
    return Compared(rows, notes, bands, groups)


def _planned(system: System, notes: list[str]) -> Iterator[tuple[str, str]]:
    """Estimator and recalibration for each row of one system; appends to `notes` what cannot be recalibrated, and why."""
    for estimator in estimators_of(system.predictions):
        yield estimator, RAW
        if system.name == ORACLE:  # calibrated by construction
            continue
        if system.calibration is None:
            reason = "there are no answers to a calibration set (data.calibration of the evaluation, or --calibration)"
        elif estimator not in estimators_of(system.calibration):
            reason = "the calibration set lacks it"
        elif missing := unrated_types(system.predictions, estimator, system.calibration):
            reason = f"no {' and no '.join(missing)} answer of the calibration set has it"
        else:
            yield from ((estimator, method) for method in METHODS)
            continue
        notes.append(f"{system.name}: {estimator} is not recalibrated: {reason}.")


# --- Groups of answers ----------------------------------------------------------------------------------------------


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


def bands_of(predictions: Sequence[EstimatedPrediction], bootstrap: ImageBootstrap) -> list[Group]:
    """The bands that contain answers, the highest first."""
    bands = []
    for low, high in pairwise(EDGES):

        def belongs(prediction: EstimatedPrediction, low: int = low, high: int = high) -> bool:
            percent = round(100 * (prediction.confidence or 0.0), 6)
            return low <= percent < high or percent == high == 100

        match = match_of(predictions, bootstrap, belongs)
        bands.append(Group(f"{low}–{high if high == 100 else high - 1}%", match.answers, match))
    return [band for band in bands[::-1] if band.n]


def groups_of_system(system: System, bootstrap: ImageBootstrap) -> list[Group]:
    """The groups of a system's answers: answer types if there are several, parts of categories, and pairs of these.

    A pair that has as many answers as one of its parts is omitted.
    """
    by_type: dict[str, list[EstimatedPrediction]] = {name: [] for name in TYPES.values()}
    by_category: dict[str, list[EstimatedPrediction]] = {}
    for prediction in system.predictions:
        by_type[TYPES[prediction.answer_type]].append(prediction)
        parts = category_groups(prediction.category)
        for name in (*parts, *map("/".join, combinations(parts, 2))):
            by_category.setdefault(name, []).append(prediction)
    types = {name: members for name, members in by_type.items() if members}
    categories = {
        name: members
        for name, members in sorted(by_category.items(), key=lambda item: (item[0].count("/"), item[0]))
        if "/" not in name or len(members) not in [len(by_category[part]) for part in name.split("/")]
    }
    groups = []
    for name, members in ({**types, **categories} if len(types) > 1 else categories).items():
        ids = {p.id for p in members}
        match = match_of(system.predictions, bootstrap, lambda p, ids=ids: p.id in ids)  # type: ignore[misc]
        metrics = metrics_of(members)
        groups.append(Group(name, len(members), match, {m: metrics[m] for m in GROUPED}))
    return groups


# --- As a file ------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("system", "estimator", "recalibration", "group", "n", "forward_passes"),
    *(f"{name}{end}" for name in MEASURED for end in ("", "_low", "_high", "_p")),
    *("says", "is_right", "is_right_low", "is_right_high", "agrees"),
)
"""The columns of the CSV file."""


def write_table(compared: Compared, path: Path) -> None:
    """Write all rows as CSV: system x estimator x recalibration x group; shares in [0, 1], and undefined values are empty.

    A row is one confidence of one system over all answers (`group` is empty), or the stated confidence in one group or band.

    Raises:
        DataError: the file cannot be written.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in compared.rows:
        cells = {"n": row.n, "forward_passes": row.passes}
        for name, (value, low, high) in row.metrics.items():
            cells |= {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_p": row.p[name]}
        keys = {"system": row.system, "estimator": row.estimator, "recalibration": row.recalibration}
        writer.writerow(keys | _defined(cells))
    for system, groups in compared.groups.items():
        for group in (*groups, *compared.bands[system]):
            match = group.match
            cells = {"n": group.n, **group.metrics, "says": match.says / 100, "is_right": match.right / 100}
            cells |= {"is_right_low": match.low / 100, "is_right_high": match.high / 100}
            keys = {"system": system, "estimator": VERBALIZED, "recalibration": RAW, "group": group.name}
            keys |= {"agrees": match.agreement} if match.answers else {}
            writer.writerow(keys | _defined(cells))
    write_text(path, out.getvalue())


def _defined(cells: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in cells.items() if value is not None and not math.isnan(value)}
