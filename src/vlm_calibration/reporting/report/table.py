"""The comparison of all systems and estimators, raw and recalibrated, with intervals and p-values.

It is written as CSV, Markdown, LaTeX and JSON beside the page.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
"""The metrics that the page, Markdown and LaTeX show; CSV and JSON hold all."""


def write_tables(rows: Sequence[Row], page: Path) -> list[Path]:
    """Write the comparison beside the page, under the page's name; returns the paths."""
    writers: dict[str, Callable[[Sequence[Row]], str]] = {
        ".csv": as_csv,
        ".md": as_markdown,
        ".tex": as_latex,
    }
    paths = []
    for suffix, write in writers.items():
        paths.append(page.with_suffix(suffix))
        write_text(paths[-1], write(rows))
    paths.append(page.with_suffix(".json"))
    write_json(paths[-1], as_json(rows))
    return paths


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    """The comparison as one object a row; undefined values are null."""
    return [
        {
            "system": row.system,
            "estimator": row.estimator,
            "recalibration": row.recalibration,
            "n": row.n,
            "forward_passes": row.passes,
            **{
                name: {**{k: _defined(v) for k, v in interval._asdict().items()}, "p": _defined(row.p[name])}
                for name, interval in row.metrics.items()
            },
        }
        for row in rows
    ]


def as_csv(rows: Sequence[Row]) -> str:
    """The comparison as CSV: every metric with its bounds and p-value; undefined values are empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [f"{name}{end}" for name in MEASURED for end in ("", "_low", "_high", "_p")]
    writer.writerow(["system", "estimator", "recalibration", "n", "forward_passes", *columns])
    for row in rows:
        cells = [_defined(v) for name in MEASURED for v in (*row.metrics[name], row.p[name])]
        texts = ["" if v is None else repr(v) for v in (row.n, row.passes, *cells)]
        writer.writerow([row.system, row.estimator, row.recalibration, *texts])
    return out.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """The headline metrics as a Markdown table of value [low, high], with a star if p < 0.05."""
    heads = ["system", "estimator", "recalibration", *HEADINGS.values()]
    lines = [heads, ["---"] * 3 + ["---:"] * len(HEADINGS)]
    for row in rows:
        names = [_escape(t, "|\\`*_<>[]") for t in (row.system, row.estimator, row.recalibration)]
        lines.append([*names, *(cell(row, name) for name in HEADINGS)])
    note = "Value [95% interval, images resampled]; * differs from the first row, p < 0.05 (paired)."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}\n"


def as_latex(rows: Sequence[Row]) -> str:
    """The table of `as_markdown` in LaTeX, for the package booktabs."""
    heads = " & ".join(["system", "estimator", "recalibration", *HEADINGS.values()])
    lines = [rf"\begin{{tabular}}{{lll{'r' * len(HEADINGS)}}}", r"\toprule", heads + r" \\", r"\midrule"]
    for row in rows:
        names = [_latex(t) for t in (row.system, row.estimator, row.recalibration)]
        lines.append(" & ".join([*names, *(_latex(cell(row, name)) for name in HEADINGS)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def cell(row: Row, name: str) -> str:
    """Format a metric: 0.031 [0.024, 0.038]*."""
    interval, p = row.metrics[name], row.p[name]
    if math.isnan(interval.value):
        return "-"
    form = "+.3f" if ALL_METRICS[name].lower < 0 else ".3f"
    text = f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
    return text + ("*" if p is not None and p < 0.05 else "")


def _defined(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _escape(text: str, special: str) -> str:
    return "".join(f"\\{c}" if c in special else c for c in " ".join(text.split()))


def _latex(text: str) -> str:
    macros = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(macros.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in " ".join(text.split()))
