"""The report's figures, as SVG in data URIs that the page embeds."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.metrics.figures import FEW, ResponseTables, reliability_diagram, response_curve
from vlm_calibration.metrics.table import PROBABILITY_STEPS, ConfidenceTable
from vlm_calibration.reporting.report.data import System

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (5.2, 4.4)
"""Width and height of a figure in inches: small, so that its text stays readable on a phone."""


class DrawnFigure(NamedTuple):
    """One figure.

    Attributes:
        uri: the figure as a data URI.
        caption: name of the system.
        text: alternative text.
    """

    uri: str
    caption: str
    text: str


class FigurePanel(NamedTuple):
    """Figures of one kind side by side.

    Attributes:
        anchor: name of their section.
        heading: what they show.
        how: how to read them.
        pictures: one figure for each system.
    """

    anchor: str
    heading: str
    how: str
    pictures: list[DrawnFigure]


def panels_of(systems: Sequence[System]) -> list[FigurePanel]:
    """Draw every kind of figure for each system whose answers allow it."""
    panels = [
        FigurePanel(
            "reliability",
            "Reliability",
            "Answers are binned by their stated confidence. A calibrated model lies on the dashed line, an overconfident one "
            f"below it. Bins with fewer than {FEW} answers are drawn faint, and no line leads to them.",
            [_draw(s, "reliability diagram", reliability_diagram, _table(s.predictions)) for s in systems],
        ),
    ]
    responses = [(s, _tables_by_perturbation(s.predictions)) for s in systems]
    curves = [
        _draw(s, "response to perturbation", response_curve, tables)
        for s, tables in responses
        if len(tables) > 1
    ]
    if curves:
        how = (
            "The key object is perturbed, more strongly to the right, until nothing of it is left. For each kind of perturbation "
            "both curves should fall together: stated confidence follows what the model can see."
        )
        panels.append(FigurePanel("response", "Response to lost evidence", how, curves))
    return panels


def _draw(system: System, kind: str, draw: Callable[..., Any], data: Any) -> DrawnFigure:
    return DrawnFigure(picture_of(lambda ax: draw(data, ax=ax)), system.name, f"{system.name}: {kind}")


def picture_of(draw: Callable[[Axes], object]) -> str:
    """Draw a figure and encode it as SVG in a data URI; the same drawing gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(
        {"svg.hashsalt": "report", "font.size": 10, "axes.titlesize": 11, "legend.fontsize": 8.5}
    ):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots())
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return data_uri("image/svg+xml", out.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """Encode bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _table(predictions: Sequence[EstimatedPrediction]) -> ConfidenceTable:
    """Counts on the fine grid: a level oracle's confidences are not whole percents, and figures must agree with the table."""
    return ConfidenceTable.from_predictions(
        [p.confidence for p in predictions], [p.correct for p in predictions], grid_steps=PROBABILITY_STEPS
    )


def _tables_by_perturbation(predictions: Sequence[EstimatedPrediction]) -> ResponseTables:
    """A table for each kind and strength of perturbation, over the evaluation splits with perturbed images."""
    perturbed = {_split(p) for p in predictions if p.strength}
    groups: dict[tuple[str, float], list[EstimatedPrediction]] = {}
    for prediction in predictions:
        if prediction.strength is not None and _split(prediction) in perturbed:
            key = (prediction.perturbation or "", prediction.strength)
            groups.setdefault(key, []).append(prediction)
    return {key: _table(answers) for key, answers in sorted(groups.items())}


def _split(prediction: EstimatedPrediction) -> str:
    """The evaluation split of an answer: the first part of its category."""
    return (prediction.category or "").split("/")[0]
