"""The report as one HTML file that embeds its figures and images and loads nothing.

The template escapes every text of a model, a data set or a configuration; the page forbids scripts and external addresses.
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined

from vlm_calibration.benchmarks.official import blocks_of
from vlm_calibration.metrics.summary import ALL_METRICS
from vlm_calibration.reporting.report.data import System
from vlm_calibration.reporting.report.examples import examples_of, thumbnails
from vlm_calibration.reporting.report.figures import panels_of
from vlm_calibration.reporting.report.listening import probe_cells, probe_headings, probe_sentences, probes_in
from vlm_calibration.reporting.report.summary import (
    ROUGH,
    TRUSTED,
    groups_of_system,
    subject_of,
    summarize_system,
)
from vlm_calibration.reporting.report.table import HEADINGS, RAW, Compared, Comparison, Row
from vlm_calibration.reporting.tables import OFFICIAL_COLUMNS, column, official_of

TEMPLATE = "page.html.j2"
RATED = ("ece", "brier", "auroc", "aurc", "mean_confidence")
"""Metrics in the tables of estimators and recalibration; accuracy is the same for all of them."""
OF_GROUPS = ("accuracy", "mean_confidence", "ece", "auroc")
"""Metrics in the table of categories."""
SHARES = frozenset(
    ("accuracy", "ece", "smooth_ece", "mean_confidence", "overconfidence", "parse_failure_rate")
)
"""Metrics that are shown in percent."""
PACKAGES = ("vlm-calibration", "torch", "transformers", "peft", "lightning", "scikit-learn", "numpy")


class Cell(NamedTuple):
    """A metric in a table.

    Attributes:
        value: as text.
        interval: its 95% interval as text.
        mark: "better" or "worse" if it differs significantly from the first system, else empty.
        why: the p-value as text.
    """

    value: str
    interval: str = ""
    mark: str = ""
    why: str = ""


def render_page(
    systems: Sequence[System], compared: Compared, comparison: Comparison, subject: str | None, images: bool
) -> str:
    """Render the page as HTML.

    Args:
        systems: all systems are compared with the first one.
        compared: the comparison of all systems, made with the settings `comparison`.
        subject: name of the system that the summary and the examples describe; None: the last trained one.
        images: whether to show images.
    """
    about = next((s for s in systems if s.name == subject), subject_of(systems))
    others = [s for s in (systems[0],) if s is not about]
    rest = [s for s in systems if s is not about and s not in others]
    examples = examples_of(about, others)
    pictures, missing = thumbnails(about, examples.predictions) if images else ({}, "")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    probes = probes_in(compared.probed)
    source = files("vlm_calibration.reporting.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        summary=summarize_system(about, compared.rows),
        thresholds=(TRUSTED, ROUGH),
        systems=systems,
        headings=HEADINGS,
        stated=[
            (row.system, [cell_of(row, name) for name in HEADINGS]) for row in compared.rows if row.is_stated
        ],
        panels=panels_of(systems),
        probe_heads=probe_headings(probes),
        probed=[(s, probe_cells(effects, probes)) for s, effects in compared.probed.items()],
        probe_sentences=probe_sentences(compared.probed.get(about.name, {})),
        official=_official(systems),
        grouped=_groups((*others, about)),
        grouped_others=_groups(rest),
        group_heads=[HEADINGS[name] for name in OF_GROUPS],
        rated_heads=[HEADINGS[name] for name in RATED],
        rated=[_rated(s, compared.rows) for s in (*others, about)],
        rated_others=[_rated(s, compared.rows) for s in rest],
        counted=any(row.passes is not None for row in compared.rows),
        recalibrated=any(row.recalibration != RAW for row in compared.rows),
        fitted_on="; ".join(dict.fromkeys(_fitted_on(s) for s in systems if s.calibration)),
        notes=compared.notes,
        examples=examples,
        pictures=pictures,
        missing=missing,
        configs=_configs(systems),
        versions=_versions(),
        comparison=comparison,
    )


def _fitted_on(system: System) -> str:
    """How many answers of which splits recalibration is fitted on, and which splits of the answers are not among them."""
    assert system.calibration is not None
    fitted, scored = (
        Counter((p.category or "").split("/")[0] for p in answers)
        for answers in (system.calibration, system.predictions)
    )
    counts = ", ".join(f"{n:,} {split}" for split, n in fitted.items() if split)
    unseen = " or ".join(split for split in scored if split and split not in fitted)
    return (
        f"{len(system.calibration):,} answers"
        + (f" ({counts})" if counts else "")
        + (f", none of them {unseen}" if unseen else "")
    )


def cell_of(row: Row, name: str) -> Cell:
    """Format a metric of a row for the page."""
    interval, p = row.metrics[name], row.p[name]
    if math.isnan(interval.value):
        return Cell("–")
    between = " to " if ALL_METRICS[name].lower < 0 else "–"  # where a dash may be a minus
    bounds = between.join(number(bound, name).removesuffix("%") for bound in interval[1:])
    if p is None or math.isnan(p):
        return Cell(number(interval.value, name), bounds)
    higher = ALL_METRICS[name].higher_is_better
    mark = ""
    if p < 0.05 and higher is not None:
        mark = "better" if (row.difference[name] > 0) == higher else "worse"
    return Cell(number(interval.value, name), bounds, mark, f"p = {p:.3f}")


def number(value: float, name: str) -> str:
    """Format a value; shares in percent."""
    if math.isnan(value):
        return "–"
    sign = "+" if ALL_METRICS[name].lower < 0 else ""
    return f"{100 * value:{sign}.1f}%" if name in SHARES else f"{value:.3f}"


def _groups(systems: Sequence[System]) -> tuple[Sequence[System], list[tuple[str, str, list[str]]]]:
    """The systems, and for each group its name, its size, and the metrics of one system after the other."""
    by_name = [{g.name: g for g in groups_of_system(s)} for s in systems]
    rows = []
    for name in dict.fromkeys(name for groups in by_name for name in groups):
        sizes = [groups[name].n for groups in by_name if name in groups]
        cells = [
            number(groups[name].metrics[metric], metric) if name in groups else ""
            for groups in by_name
            for metric in OF_GROUPS
        ]
        rows.append((name, f"{max(sizes):,}", cells))
    return systems, rows


def _rated(system: System, rows: Sequence[Row]) -> tuple[System, list[tuple[Row, list[Cell]]]]:
    """The rows of one system: every estimator, raw and recalibrated."""
    rows = [row for row in rows if row.system == system.name]
    return system, [(row, [cell_of(row, name) for name in RATED]) for row in rows]


def _official(systems: Sequence[System]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Scores under a benchmark's own rules: system, block, and (name, value) of each score."""
    rows = []
    for system in systems:
        defined = {k: v for k, v in system.metrics.items() if v is not None}
        for block, scores in blocks_of(official_of(defined)).items():
            form = ".4f" if "yes_ratio" in scores else ".1f"
            values = [
                (column(key)[0], format(scores[key], form)) for key in OFFICIAL_COLUMNS if key in scores
            ]
            rows.append((system.name, block or "all", values))
    return rows


def _configs(systems: Sequence[System]) -> list[tuple[str, str]]:
    """Folder and YAML of each configuration."""
    configs = {str(s.folder): s.config for s in systems if s.config is not None}
    return [(folder, yaml.safe_dump(config, sort_keys=False)) for folder, config in configs.items()]


def _versions() -> list[tuple[str, str]]:
    versions: list[tuple[str, str]] = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            versions.append((package, version(package)))
        except PackageNotFoundError:  # the package runs from a source tree
            continue
    return versions
