"""The report as one HTML file that embeds its figures and images and loads nothing.

The template escapes every text of a model, a data set or a configuration; the page forbids scripts and external addresses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence, Set
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import yaml
from jinja2 import Environment, StrictUndefined

from vlm_calibration.metrics.risk_control import percent
from vlm_calibration.metrics.summary import ALL_METRICS
from vlm_calibration.reporting.report.agreement import TOLERANCE, Group
from vlm_calibration.reporting.report.data import System
from vlm_calibration.reporting.report.examples import examples_of, thumbnails
from vlm_calibration.reporting.report.figures import FigurePanel, panels_of
from vlm_calibration.reporting.report.listening import probe_sentences
from vlm_calibration.reporting.report.summary import (
    MIN_CHECKED,
    ROUGH,
    TRUSTED,
    subject_of,
    summarize_system,
    weakest_group,
)
from vlm_calibration.reporting.report.table import HEADINGS, RAW, Compared, Comparison, Row
from vlm_calibration.reporting.report.thresholds import (
    CERTAINTY,
    MAX_ERRORS,
    SystemPromises,
    ThresholdCell,
    broken_sentence,
    coverage_cell,
    error_cell,
    uncalibrated_sentence,
)

TEMPLATE = "page.html.j2"
SHARES = frozenset(
    ("accuracy", "ece", "smooth_ece", "mean_confidence", "overconfidence", "parse_failure_rate")
)
"""Metrics that are shown in percent."""


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
    systems: Sequence[System],
    compared: Compared,
    comparison: Comparison,
    promises: Sequence[SystemPromises],
    subject: str | None,
    images: bool,
    page: Path,
) -> str:
    """Render the page as HTML.

    Args:
        systems: all systems are compared with the first one.
        compared: the comparison of all systems, made with the settings `comparison`.
        promises: what thresholds of the systems promise and do.
        subject: name of the system that the summary and the examples describe; None: the last trained one.
        images: whether to show images.
        page: file of the page; the table that it links to lies beside it.
    """
    about = next((s for s in systems if s.name == subject), subject_of(systems))
    first = [about, *(s for s in (systems[0],) if s is not about)]
    ordered = [*first, *(s for s in systems if s not in first)]
    examples = examples_of(about, first[1:])
    pictures, missing = thumbnails(about, examples.predictions) if images else ({}, "")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("vlm_calibration.reporting.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    groups = {s.name: compared.groups[s.name] for s in ordered}
    panels, summary = panels_of(systems), summarize_system(about, compared)
    spoken = [(s.name, probe_sentences(compared.probed.get(s.name, {}))) for s in ordered]
    probed = [(name, sentences) for name, sentences in spoken if sentences]
    present = {"confidence": summary.bands, "probes": probed, "groups": any(groups.values())}
    return environment.from_string(source).render(
        contents=_contents(panels, {name for name, content in present.items() if not content}),
        csv=quote(page.with_suffix(".csv").name),
        summary=summary,
        label=about.origin.label,
        rule={"trusted": TRUSTED, "rough": ROUGH, "answers": MIN_CHECKED, "points": TOLERANCE},
        cards=[(s.name, s.origin, weakest_group(groups[s.name])) for s in systems],
        headings=HEADINGS,
        raw=[
            (row.name, [cell_of(row, metric) for metric in HEADINGS])
            for row in compared.rows
            if row.recalibration == RAW
        ],
        promised=[(row.name, [coverage_cell(promise) for promise in row.promises]) for row in promises],
        max_errors=[percent(limit) for limit in MAX_ERRORS],
        certainty=percent(CERTAINTY),
        tested=_tested(promises, about),
        uncalibrated=uncalibrated_sentence(systems),
        panels=panels,
        probed=probed,
        grouped=[(name, _group_rows(rows)) for name, rows in groups.items() if rows],
        fitted_on="; ".join(dict.fromkeys(_fitted_on(s) for s in systems if s.calibration)),
        notes=compared.notes,
        examples=examples,
        pictures=pictures,
        missing=missing,
        made_from=[(s.name, len(s.predictions)) for s in systems],
        versions={str(s.folder): s.versions for s in systems},
        configs=_configs(systems),
        comparison=comparison,
    )


def _contents(panels: Sequence[FigurePanel], empty: Set[str]) -> dict[str, str]:
    """The sections of the page, without the empty ones: anchor -> heading."""
    sections = {
        "confidence": "What it says, and how often that is right",
        "systems": "The systems",
        "comparison": "Side by side",
        "thresholds": "What to send to a person",
        **{panel.anchor: panel.heading for panel in panels},
        "probes": "What confidence listens to",
        "groups": "By category",
        "overconfident": "Most confident wrong answers",
        "underconfident": "Least confident correct answers",
        "numbers": "What the numbers mean",
        "made": "How this was made",
    }
    return {anchor: heading for anchor, heading in sections.items() if anchor not in empty}


def _tested(
    promises: Sequence[SystemPromises], about: System
) -> list[tuple[str, str, list[tuple[str, list[ThresholdCell]]]]]:
    """Each confidence with what contradicts its promises, and the cells of each part of the test; that of `about` first."""
    ordered = sorted(promises, key=lambda row: row.system != about.name)
    tested = []
    for row in ordered:
        parts = dict.fromkeys(part for promise in row.promises for part in promise.tested)
        cells = [(part, [error_cell(promise, part) for promise in row.promises]) for part in parts]
        tested.append((row.name, broken_sentence(row), cells))
    return tested


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


def _group_rows(groups: Sequence[Group]) -> list[tuple[Group, str, str, str]]:
    """Each group with its number of answers, ECE and AUROC as text."""
    return [
        (g, f"{g.n:,}", number(g.metrics["ece"], "ece"), number(g.metrics["auroc"], "auroc")) for g in groups
    ]


def _configs(systems: Sequence[System]) -> list[tuple[str, str]]:
    """Folder and YAML of each configuration."""
    configs = {str(s.folder): s.config for s in systems if s.config is not None}
    return [(folder, yaml.safe_dump(config, sort_keys=False)) for folder, config in configs.items()]
