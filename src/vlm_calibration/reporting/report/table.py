"""The comparison of all systems and estimators, raw and recalibrated, with intervals and p-values.

It is written as CSV and JSON beside the page.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vlm_calibration.estimators.predictions import VERBALIZED, estimators_of
from vlm_calibration.estimators.recalibration import METHODS, recalibrated, unrated_types
from vlm_calibration.files import write_json, write_text
from vlm_calibration.metrics.bootstrap import Interval
from vlm_calibration.metrics.summary import ALL_METRICS
from vlm_calibration.progress import track
from vlm_calibration.reporting.report.agreement import Band, Group, bands_of, groups_of_system
from vlm_calibration.reporting.report.bootstrap import MEASURED, ImageBootstrap, Measured, p_value
from vlm_calibration.reporting.report.data import ORACLE, System
from vlm_calibration.reporting.report.listening import ProbeEffect, probe_effects

RAW = "raw"


@dataclass(frozen=True)
class Comparison:
    """Settings of the comparison.

    Attributes:
        replicates: number of bootstrap draws.
        seed: seed of the draws.
    """

    replicates: int = 1000
    seed: int = 0


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

    @property
    def name(self) -> str:
        """The system, with the estimator if it is not the stated confidence."""
        return self.system if self.estimator == VERBALIZED else f"{self.system}, {self.estimator}"

    @property
    def is_stated(self) -> bool:
        """Whether this is the stated confidence, not recalibrated."""
        return self.estimator == VERBALIZED and self.recalibration == RAW


class Compared(NamedTuple):
    """The comparison.

    Attributes:
        rows: rows of every system, its stated confidence first.
        notes: why rows are missing.
        probed: system -> the effect of each probe on its stated confidence, for systems that were probed.
        bands: system -> its bands of stated confidence, the highest first.
        groups: system -> its groups of answers.
    """

    rows: list[Row]
    notes: list[str]
    probed: Mapping[str, Mapping[str, ProbeEffect]]
    bands: Mapping[str, Sequence[Band]]
    groups: Mapping[str, Sequence[Group]]


def compare(systems: Sequence[System], comparison: Comparison) -> Compared:
    """Measure every confidence of every system, and compare it with the stated confidence of the first system."""
    rows: list[Row] = []
    notes: dict[str, None] = {}
    base: Measured | None = None
    planned = [(system, *pair) for system in systems for pair in _planned(system, notes)]
    bootstraps: dict[str, ImageBootstrap] = {}
    probed: dict[str, Mapping[str, ProbeEffect]] = {}
    bands: dict[str, Sequence[Band]] = {}
    groups: dict[str, Sequence[Group]] = {}
    for system, estimator, recalibration in track(
        planned, "bootstrap intervals", len(planned), "confidences"
    ):
        if system.name not in bootstraps:
            # One at a time, since the draws of many images take memory.
            bootstrap = ImageBootstrap(system.predictions, comparison.replicates, comparison.seed)
            bootstraps = {system.name: bootstrap}
            if effects := probe_effects(system.predictions, bootstrap):
                probed[system.name] = effects
            bands[system.name] = bands_of(system.predictions, bootstrap)
            groups[system.name] = groups_of_system(system, bootstrap)
        measured = bootstraps[system.name].measure(_confidences(system, estimator, recalibration))
        base = base or measured
        is_base = measured is base
        rows.append(
            Row(
                system.name,
                estimator,
                recalibration,
                len(system.predictions),
                measured.intervals,
                {name: measured.values[name] - base.values[name] for name in MEASURED},
                {name: None if is_base else p_value(measured, base, name) for name in MEASURED},
                system.passes(estimator) if recalibration == RAW else None,
            )
        )
    return Compared(rows, list(notes), probed, bands, groups)


def _planned(system: System, notes: dict[str, None]) -> Iterator[tuple[str, str]]:
    """Estimator and recalibration for each row of one system; appends to `notes` what cannot be recalibrated."""
    for estimator in system.estimators:
        yield estimator, RAW
        if system.name == ORACLE:  # calibrated by construction
            continue
        if (reason := _why_not_recalibrated(system, estimator)) is not None:
            notes[f"{system.name}: {estimator} is not recalibrated: {reason}."] = None
            continue
        for method in METHODS:
            yield estimator, method


def _confidences(system: System, estimator: str, recalibration: str) -> list[float | None]:
    """The confidence in each answer of a system."""
    if recalibration == RAW:
        return [p.confidence_of(estimator) for p in system.predictions]
    assert system.calibration is not None
    return recalibrated(recalibration, system.predictions, estimator, system.calibration)


def _why_not_recalibrated(system: System, estimator: str) -> str | None:
    """Why no recalibration of this estimator can be fitted, None if it can."""
    if system.calibration is None:
        return (
            "there are no answers to a calibration set (data.calibration of the evaluation, or --calibration)"
        )
    if estimator not in estimators_of(system.calibration):
        return "the calibration set lacks it"
    missing = unrated_types(system.predictions, estimator, system.calibration)
    return f"no {' and no '.join(missing)} answer of the calibration set has it" if missing else None


# --- As files ---------------------------------------------------------------------------------------------------

HEADINGS: dict[str, str] = {
    name: ALL_METRICS[name].heading
    for name in (
        *("accuracy", "ece", "brier", "auroc", "aurc", "smooth_ece"),
        *("mean_confidence", "overconfidence", "parse_failure_rate"),
    )
}
"""The metrics that the page shows; CSV and JSON hold all."""
COLUMNS = (
    *("system", "estimator", "recalibration", "group", "n", "forward_passes"),
    *(f"{name}{end}" for name in MEASURED for end in ("", "_low", "_high", "_p")),
    *("says", "is_right", "is_right_low", "is_right_high", "agrees"),
)
"""The columns of CSV and JSON."""


def write_tables(compared: Compared, page: Path) -> list[Path]:
    """Write all rows beside the page, as CSV and JSON under its name; returns the paths.

    A row is one confidence of one system over all answers (`group` is empty), or the stated confidence in one group or range of
    confidence. Undefined values are empty in the CSV and null in the JSON.

    Raises:
        DataError: a file cannot be written.
    """
    rows = records_of(compared)
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    paths = [page.with_suffix(".csv"), page.with_suffix(".json")]
    write_text(paths[0], out.getvalue())
    write_json(paths[1], rows)
    return paths


Record = dict[str, str | float | None]


def records_of(compared: Compared) -> list[Record]:
    """The rows of `write_tables`, by column; shares in [0, 1]."""
    records: list[Record] = []
    for row in compared.rows:
        record: Record = {
            "system": row.system,
            "estimator": row.estimator,
            "recalibration": row.recalibration,
            "group": "",
            "n": row.n,
            "forward_passes": row.passes,
        }
        for name, (value, low, high) in row.metrics.items():
            cells = {"": value, "_low": low, "_high": high, "_p": row.p[name]}
            record |= {f"{name}{end}": _defined(cell) for end, cell in cells.items()}
        records.append(record)
    for system, groups in compared.groups.items():
        parts = [(group.name, group.n, group.match, group.metrics) for group in groups]
        parts += [(band.name, band.match.answers, band.match, {}) for band in compared.bands[system]]
        for name, n, match, metrics in parts:
            record = {"system": system, "estimator": VERBALIZED, "recalibration": RAW, "group": name, "n": n}
            record |= {metric: _defined(value) for metric, value in metrics.items()}
            shares = {
                "says": match.says,
                "is_right": match.right,
                "is_right_low": match.low,
                "is_right_high": match.high,
            }
            record |= {column: _defined(percent / 100) for column, percent in shares.items()}
            records.append({**record, "agrees": match.agreement if match.answers else None})
    return records


def _defined(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value
