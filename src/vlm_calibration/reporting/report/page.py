"""The report as one HTML file that embeds its figures and images and loads nothing.

The template escapes every text of a model, a data set or a configuration; the page forbids scripts and external addresses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd
import yaml
from jinja2 import Environment, StrictUndefined

from vlm_calibration.metrics.figures import FEW
from vlm_calibration.metrics.risk_control import percent
from vlm_calibration.metrics.task import ALL_METRICS
from vlm_calibration.reporting.report import summary, table, thresholds
from vlm_calibration.reporting.report.data import System, probe_values_of
from vlm_calibration.reporting.report.pictures import examples_of, figures_of, thumbnails
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
    frame: pd.DataFrame,
    notes: Sequence[str],
    about: System,
    csv: Path,
    *,
    images: bool,
    replicates: int,
    seed: int,
) -> str:
    """Render the page as HTML.

    Args:
        systems: all systems are compared with the first one.
        frame: their comparison, see `compare`.
        notes: why rows are missing in it.
        about: the system that the summary and the examples describe.
        csv: file of all numbers, which lies beside the page.
        images: whether to show images.
        replicates: number of bootstrap draws of the comparison.
        seed: seed of the draws.
    """
    ordered = sorted(systems, key=lambda s: (s is not about, s is not systems[0]))
    examples = examples_of(about, [s for s in ordered[1:2] if s is systems[0]])
    answers = [example.answer for part in examples.values() for example in part]
    pictures, missing = thumbnails(about, answers) if images else ({}, "")
    figures, promises = figures_of(systems), thresholds.promises_of(systems)
    bands = table.parts_of_system(frame, about.name, table.BAND).to_dict("records")
    grouped = {s.name: table.parts_of_system(frame, s.name, table.GROUP).to_dict("records") for s in ordered}
    probed = {s.name: summary.probe_sentences(probe_values_of(s.predictions)) for s in ordered}
    contents = {
        "confidence": "What it says, and how often that is right" if bands else "",
        "systems": "The systems",
        "comparison": "Side by side",
        "thresholds": "What to send to a person",
        "reliability": "Reliability",
        "response": "Response to lost evidence" if figures["response"] else "",
        "probes": "What confidence listens to" if any(probed.values()) else "",
        "groups": "By category" if any(grouped.values()) else "",
        "overconfident": "Most confident wrong answers",
        "underconfident": "Least confident correct answers",
        "numbers": "What the numbers mean",
        "made": "How this was made",
    }
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["points"] = lambda share, decimals=0: f"{100 * share:.{decimals}f}"
    environment.filters["percent"] = percent
    modules = {"summary": summary, "table": table, "thresholds": thresholds}
    cells = {"metric_cell": metric_cell, "coverage_cell": coverage_cell, "error_cell": error_cell}
    environment.globals |= {
        **modules,
        **cells,
        "shown": shown,
        "as_yaml": partial(yaml.safe_dump, sort_keys=False),
    }
    source = files("vlm_calibration.reporting.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        contents={anchor: title for anchor, title in contents.items() if title},
        csv=quote(csv.name),
        overview=summary.summarize_system(about.name, frame),
        about=about,
        bands=bands,
        systems=systems,
        frame=frame,
        metrics={name: heading(name) for name in METRICS},
        raw=frame[(frame.kind == table.ALL) & (frame.recalibration == table.RAW)].to_dict("records"),
        promises=promises,
        # The described system first.
        tested=sorted(promises.items(), key=lambda item: item[0][0] != about.name),
        figures=figures,
        few=FEW,
        probed={name: sentences for name, sentences in probed.items() if sentences},
        grouped={name: rows for name, rows in grouped.items() if rows},
        fitted_on="; ".join(dict.fromkeys(_fitted_on(s) for s in systems if s.calibration)),
        notes=notes,
        examples=examples,
        pictures=pictures,
        missing=missing,
        by_folder={str(s.folder): s for s in systems},
        replicates=replicates,
        seed=seed,
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


def metric_cell(row: Mapping[str, Any], name: str, base: Mapping[str, Any]) -> Cell:
    """A metric of a row of the frame, with its interval, and compared with the first row."""
    spec, value, p = ALL_METRICS[name], row[name], row[f"{name}_p"]
    if math.isnan(value):
        return Cell("–")
    between = " to " if spec.lower < 0 else "–"  # where a dash may be a minus
    bounds = (shown(name, row[f"{name}_{end}"], percent=True).removesuffix("%") for end in ("low", "high"))
    mark = ""
    if p < 0.05 and spec.higher_is_better is not None:
        mark = "better" if (value > base[name]) == spec.higher_is_better else "worse"
    why = "" if math.isnan(p) else f"p = {p:.3f}"
    return Cell(shown(name, value, percent=True), [between.join(bounds)], mark, why)


def coverage_cell(promise: thresholds.Promise) -> Cell:
    """The share of the calibration answers that a threshold gives."""
    choice = promise.choice
    if choice.scores is None or choice.threshold is None:
        return Cell("no threshold gives this")
    value, low, high = choice.scores.coverage
    return Cell(f"{value:.1%}", [f"{100 * low:.1f}–{high:.1%}", f"from {percent(choice.threshold)} on"])


def error_cell(promise: thresholds.Promise, part: str) -> Cell:
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
