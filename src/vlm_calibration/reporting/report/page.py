"""The report as one HTML file that embeds its figures and images and loads nothing.

The template escapes every text of a model, a data set or a configuration; the page forbids scripts and external addresses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import yaml
from jinja2 import Environment, StrictUndefined

from vlm_calibration.metrics.risk_control import percent
from vlm_calibration.metrics.summary import ALL_METRICS
from vlm_calibration.reporting.report.data import System
from vlm_calibration.reporting.report.pictures import examples_of, panels_of, thumbnails
from vlm_calibration.reporting.report.summary import (
    MIN_CHECKED,
    ROUGH,
    TRUSTED,
    probe_sentences,
    summarize_system,
    weakest_group,
)
from vlm_calibration.reporting.report.table import RAW, TOLERANCE, Compared, Row, confidence_name
from vlm_calibration.reporting.report.thresholds import (
    CERTAINTY,
    MAX_ERRORS,
    Promise,
    broken_sentence,
    promises_of,
    uncalibrated_sentence,
)
from vlm_calibration.reporting.tables import heading, shown

TEMPLATE = "page.html.j2"
METRICS = (
    *("accuracy", "ece", "brier", "auroc", "aurc", "smooth_ece"),
    *("mean_confidence", "overconfidence", "parse_failure_rate"),
)
"""The metrics that the page shows; the CSV file holds all."""


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        value: as text.
        notes: lines below it, such as its interval.
        mark: "better" or "worse" than the first system beyond chance, or "differs" from what is promised; else empty.
        why: the p-value as text.
    """

    value: str
    notes: Sequence[str] = ()
    mark: str = ""
    why: str = ""


def render_page(
    systems: Sequence[System],
    compared: Compared,
    about: System,
    table: Path,
    *,
    images: bool,
    replicates: int,
    seed: int,
) -> str:
    """Render the page as HTML.

    Args:
        systems: all systems are compared with the first one.
        compared: the comparison of all systems.
        about: the system that the summary and the examples describe.
        table: file of all numbers, which lies beside the page.
        images: whether to show images.
        replicates: number of bootstrap draws of the comparison.
        seed: seed of the draws.
    """
    ordered = sorted(systems, key=lambda s: (s is not about, s is not systems[0]))
    examples = examples_of(about, [s for s in ordered[1:2] if s is systems[0]])
    answers = [example.answer for part in examples.values() for example in part]
    pictures, missing = thumbnails(about, answers) if images else ({}, "")
    panels, summary = panels_of(systems), summarize_system(about, compared)
    probed = [(s.name, sentences) for s in ordered if (sentences := probe_sentences(s.values))]
    grouped = [(s.name, compared.groups[s.name]) for s in ordered if compared.groups[s.name]]
    promises = promises_of(systems)
    contents = {
        "confidence": "What it says, and how often that is right" if compared.bands[about.name] else "",
        "systems": "The systems",
        "comparison": "Side by side",
        "thresholds": "What to send to a person",
        **{panel.anchor: panel.heading for panel in panels},
        "probes": "What confidence listens to" if probed else "",
        "groups": "By category" if grouped else "",
        "overconfident": "Most confident wrong answers",
        "underconfident": "Least confident correct answers",
        "numbers": "What the numbers mean",
        "made": "How this was made",
    }
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("vlm_calibration.reporting.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        contents={anchor: title for anchor, title in contents.items() if title},
        csv=quote(table.name),
        summary=summary,
        about=about,
        bands=compared.bands[about.name],
        rule={"trusted": TRUSTED, "rough": ROUGH, "answers": MIN_CHECKED, "points": TOLERANCE},
        cards=[(s.name, s.origin, weakest_group(compared.groups[s.name])) for s in systems],
        headings=[heading(name) for name in METRICS],
        raw=[
            (confidence_name(row.system, row.estimator), [metric_cell(row, metric) for metric in METRICS])
            for row in compared.rows
            if row.recalibration == RAW
        ],
        promised=[(row.name, [coverage_cell(promise) for promise in row.promises]) for row in promises],
        max_errors=[percent(limit) for limit in MAX_ERRORS],
        certainty=percent(CERTAINTY),
        tested=[
            (
                row.name,
                broken_sentence(row),
                {
                    part: [error_cell(promise, part) for promise in row.promises]
                    for promise in row.promises
                    for part in promise.tested
                },
            )
            for row in sorted(promises, key=lambda row: row.system != about.name)
        ],
        uncalibrated=uncalibrated_sentence(systems),
        panels=panels,
        probed=probed,
        grouped=grouped,
        fitted_on="; ".join(dict.fromkeys(_fitted_on(s) for s in systems if s.calibration)),
        notes=compared.notes,
        examples=examples,
        pictures=pictures,
        missing=missing,
        made_from=[(s.name, len(s.predictions)) for s in systems],
        versions={str(s.folder): s.versions for s in systems},
        configs={
            str(s.folder): yaml.safe_dump(s.config, sort_keys=False) for s in systems if s.config is not None
        },
        replicates=replicates,
        seed=seed,
        shown=shown,
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


def metric_cell(row: Row, name: str) -> Cell:
    """A metric of a row, with its interval."""
    (value, *bounds), p, spec = row.metrics[name], row.p[name], ALL_METRICS[name]
    if math.isnan(value):
        return Cell("–")
    between = " to " if spec.lower < 0 else "–"  # where a dash may be a minus
    interval = between.join(shown(name, bound, percent=True).removesuffix("%") for bound in bounds)
    cell = Cell(shown(name, value, percent=True), [interval])
    if p is None or math.isnan(p):
        return cell
    mark = ""
    if p < 0.05 and spec.higher_is_better is not None:
        mark = "better" if (row.difference[name] > 0) == spec.higher_is_better else "worse"
    return cell._replace(mark=mark, why=f"p = {p:.3f}")


def coverage_cell(promise: Promise) -> Cell:
    """The share of the calibration answers that a threshold gives."""
    choice = promise.choice
    if choice.scores is None or choice.threshold is None:
        return Cell("no threshold gives this")
    value, low, high = choice.scores.coverage
    return Cell(f"{value:.1%}", [f"{100 * low:.1f}–{high:.1%}", f"from {percent(choice.threshold)} on"])


def error_cell(promise: Promise, part: str) -> Cell:
    """The share of wrong answers among those given on a part of the test."""
    if part not in promise.tested:
        return Cell("–")
    scores = promise.tested[part]
    given = f"{scores.answers:,} of {scores.n:,} given"
    if not scores.answers:
        return Cell("–", [given])
    value, low, high = scores.error
    interval = f"{100 * low:.1f}–{high:.1%}"
    return Cell(f"{value:.1%}", [interval, given], "differs" if part in promise.broken else "")
