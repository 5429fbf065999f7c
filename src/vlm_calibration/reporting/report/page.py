"""The report as one HTML file that embeds its figures and images and loads nothing.

The template escapes every text of a model, a data set or a configuration; the page forbids scripts and external addresses.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image

from vlm_calibration.estimators.predictions import probes_of
from vlm_calibration.files import first_line
from vlm_calibration.metrics.figures import FEW, ResponseTables, reliability_diagram, response_curve
from vlm_calibration.metrics.risk_control import percent
from vlm_calibration.metrics.table import ConfidenceTable
from vlm_calibration.metrics.task import ALL_METRICS
from vlm_calibration.perturbation.levels import Perturbation
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.reporting.card import templates
from vlm_calibration.reporting.report import summary, table, thresholds
from vlm_calibration.reporting.report.data import System, model_settings, probe_values_of, table_of
from vlm_calibration.reporting.tables import COLUMNS, heading, shown

SIZE = (5.2, 4.4)  # width and height of a figure in inches: small, so that its text stays readable on a phone
MAX_EXAMPLES = 8
THUMBNAIL_SIDE = 320  # pixels of a thumbnail's longer side
PIXEL_ART_SIDE = 128  # images up to this size are stored losslessly, as PNG


def figures_of(systems: Sequence[System]) -> dict[str, dict[str, str]]:
    """Section of the page -> system -> its figure as a data URI; only perturbed images have a response."""

    def reliability(table: ConfidenceTable, figure: Any) -> None:
        reliability_diagram(table, ax=figure.subplots())

    responses = {s.name: _tables_by_perturbation(s.predictions) for s in systems}
    diagrams = {s.name: _draw(reliability, table_of(s.predictions)) for s in systems}
    curves = {name: _draw(response_curve, t) for name, t in responses.items() if len(t) > 1}
    return {"reliability": diagrams, "response": curves}


def _draw(draw: Callable[..., Any], data: Any) -> str:
    """Draw a figure and encode it as SVG in a data URI; the same drawing gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": "report", "font.size": 10, "axes.titlesize": 11, "legend.fontsize": 8.5}
    with rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(data, figure=figure)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return _data_uri("image/svg+xml", out)


def _data_uri(kind: str, file: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _tables_by_perturbation(predictions: Sequence[Prediction]) -> ResponseTables:
    """A table for each kind and strength of perturbation, over the evaluation splits with perturbed images."""
    split_of = {p.id: (p.category or "").split("/")[0] for p in predictions}
    perturbed = {split_of[p.id] for p in predictions if p.strength}
    groups: dict[tuple[str, float], list[Prediction]] = {}
    for p in predictions:
        if p.strength is not None and split_of[p.id] in perturbed:
            groups.setdefault((p.perturbation or "", p.strength), []).append(p)
    return {key: table_of(answers) for key, answers in sorted(groups.items())}


def examples_of(system: System) -> dict[str, list[Prediction]]:
    """The most confident wrong answers, "overconfident", and the least confident correct ones, "underconfident"; one an image."""
    examples = {}
    for name, is_correct, sign in (("overconfident", False, -1), ("underconfident", True, 1)):
        confident = [p for p in system.predictions if p.confidence is not None and p.correct == is_correct]
        by_image: dict[str, Prediction] = {}
        for prediction in sorted(confident, key=lambda p: (sign * (p.confidence or 0.0), p.id)):
            by_image.setdefault(prediction.image or prediction.id, prediction)
        examples[name] = list(by_image.values())[:MAX_EXAMPLES]
    return examples


def perturbation_of(answer: Prediction) -> str:
    """What happened to the image of an answer, in words; empty if that is not known."""
    if answer.perturbation is None or answer.strength is None:
        return ""
    return str(Perturbation(answer.perturbation, answer.strength))


def thumbnails(system: System, predictions: Sequence[Prediction]) -> tuple[dict[str, str], str]:
    """Thumbnails of the images behind some predictions, query id -> data URI, and why images are missing, empty if none is."""
    images = {}
    try:
        dataset = _dataset(system.config, predictions)
        index = {query.id: i for i, query in enumerate(dataset.queries)}
        for prediction in predictions:
            sample = dataset[0, index[prediction.id]] if prediction.id in index else None
            # With another noise policy than the run's, the image would be perturbed in another way.
            asked = (prediction.question, prediction.perturbation, prediction.strength)
            if sample is not None and asked == (sample.query.question, *sample.perturbation):
                images[prediction.id] = thumbnail(sample.image)
    except (DataError, ArgumentError, OSError, ValueError, TypeError, ImportError) as error:
        return {}, f"The images could not be loaded: {first_line(error)}"
    missing = len(predictions) - len(images)
    words = f"{missing} of the images are missing: the data have changed since the run."
    return images, words if missing else ""


def thumbnail(image: np.ndarray) -> str:
    """Encode an image, uint8 [H, W, 3], as a data URI, its longer side at most `THUMBNAIL_SIDE` pixels."""
    picture, file = Image.fromarray(image), io.BytesIO()
    if max(picture.size) <= PIXEL_ART_SIDE:
        picture.save(file, format="PNG", optimize=True)
        return _data_uri("image/png", file)
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    picture.save(file, format="JPEG", quality=85)
    return _data_uri("image/jpeg", file)


def _dataset(config: Mapping[str, Any], predictions: Sequence[Prediction]) -> Any:
    """The data set that a run answered, built from the run's configuration; DataError if it has none."""
    from vlm_calibration.data.module import PerturbedQueryDataModule

    if not isinstance(config.get("data"), Mapping):
        raise DataError("there is no config.yaml with the data beside the predictions")
    base = model_settings(config, "base")
    # The command line links these settings to the model's.
    linked = {"processor": base.get("name_or_path"), "revision": base.get("revision")}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PerturbedQueryDataModule, "data")
    # Never run code that comes with a checkpoint only to show images.
    settings = parser.parse_object({"data": {**config["data"], **linked, "trust_remote_code": False}})
    data = parser.instantiate_classes(settings).data
    # A stage of training may have a test set in its configuration as well, and it answers the validation set.
    prefixes = tuple(f"{name}:" if name else "" for name in data.test or ())
    is_test = bool(prefixes) and all(p.id.startswith(prefixes) for p in predictions)
    stage, role = ("test", "test") if is_test else ("validate", "validation")
    data.setup(stage)
    return data.sets[role]


METRICS = (*COLUMNS[:4], "aurc", "smooth_ece", *COLUMNS[4:])
"""The metrics that the page shows, the headline ones and two more; the CSV file holds all."""


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
    environment = templates(Path(__file__).parent, autoescape=True)
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
    both = (calibration, system.predictions)
    fitted, scored = (Counter(p.category.split("/")[0] for p in some if p.category) for some in both)
    counts = ", ".join(f"{n:,} {split}" for split, n in fitted.items())
    unseen = " or ".join(split for split in scored if split not in fitted)
    text = f"{len(calibration):,} answers" + (f" ({counts})" if counts else "")
    return text + (f", none of them {unseen}" if unseen else "")
