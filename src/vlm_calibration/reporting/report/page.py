"""The report as one HTML file that embeds its figures and images and loads nothing.

The template escapes every text of a model, a data set or a configuration; the page forbids scripts and external addresses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlm_calibration.estimators.predictions import probes_of
from vlm_calibration.metrics.figures import FEW
from vlm_calibration.metrics.risk_control import percent
from vlm_calibration.metrics.task import ALL_METRICS
from vlm_calibration.reporting.report import summary, table, thresholds
from vlm_calibration.reporting.report.data import System, probe_values_of
from vlm_calibration.reporting.report.pictures import examples_of, figures_of, perturbation_of, thumbnails
from vlm_calibration.reporting.tables import heading, shown

METRICS = (
    *("accuracy", "ece", "brier", "auroc", "aurc", "smooth_ece"),
    *("mean_confidence", "overconfidence", "parse_failure_rate"),
)
"""The metrics that the page shows; the CSV file holds all."""


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
    """The page about the comparison of `compare`, as HTML.

    Args:
        about: the system that the summary and the examples describe.
        csv: file of all numbers, which lies beside the page.
        images: whether to show images.
    """
    ordered = sorted(systems, key=lambda s: (s is not about, s is not systems[0]))
    examples = examples_of(about)
    pictures, missing = thumbnails(about, [*chain(*examples.values())]) if images else ({}, "")
    figures, promises = figures_of(systems), thresholds.promises_of(systems)
    bands = table.parts_of_system(frame, about.name, table.BAND).to_dict("records")
    row = next(row for row in table.stated_rows(frame).itertuples() if row.system == about.name)
    checks = summary.checked(table.parts_of_system(frame, about.name, table.GROUP, table.BAND))
    grouped = {s.name: table.parts_of_system(frame, s.name, table.GROUP).to_dict("records") for s in ordered}
    grouped = {name: rows for name, rows in grouped.items() if rows}
    values = {s.name: probe_values_of(s.predictions, probes_of(s.predictions)) for s in ordered}
    probed = {name: said for name, v in values.items() if (said := summary.probe_sentences(v))}
    contents = {
        "confidence": "What it says, and how often that is right" if bands else "",
        "systems": "The systems",
        "comparison": "Side by side",
        "thresholds": "What to send to a person",
        "reliability": "Reliability",
        "response": "Response to lost evidence" if figures["response"] else "",
        "probes": "What confidence listens to" if probed else "",
        "groups": "By category" if grouped else "",
        "overconfident": "Most confident wrong answers",
        "underconfident": "Least confident correct answers",
        "numbers": "What the numbers mean",
        "made": "How this was made",
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["points"] = lambda share, decimals=0: f"{100 * share:.{decimals}f}"
    environment.filters["percent"] = percent
    return environment.get_template("page.html.j2").render(
        summary=summary,
        table=table,
        thresholds=thresholds,
        specs=ALL_METRICS,
        shown=shown,
        as_yaml=partial(yaml.safe_dump, sort_keys=False),
        contents={anchor: title for anchor, title in contents.items() if title},
        csv=quote(csv.name),
        about=about,
        row=row,
        checks=checks,
        verdict=summary.verdict_of(row, checks),
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
        probed=probed,
        grouped=grouped,
        fitted_on="; ".join(dict.fromkeys(_fitted_on(s) for s in systems if s.calibration)),
        notes=notes,
        examples=examples,
        perturbation_of=perturbation_of,
        texts_of_first={p.id: p.text for p in systems[0].predictions},
        pictures=pictures,
        missing=missing,
        by_folder={str(s.folder): s for s in systems},
        replicates=replicates,
        seed=seed,
    )


def _fitted_on(system: System) -> str:
    """How many answers of which splits recalibration is fitted on, and which splits of the answers are not among them."""
    calibration = system.calibration or ()
    fitted, scored = (
        Counter(p.category.split("/")[0] for p in answers if p.category)
        for answers in (calibration, system.predictions)
    )
    counts = ", ".join(f"{n:,} {split}" for split, n in fitted.items())
    unseen = " or ".join(split for split in scored if split not in fitted)
    text = f"{len(calibration):,} answers" + (f" ({counts})" if counts else "")
    return text + (f", none of them {unseen}" if unseen else "")
