"""The report's figures, as pictures that a page can hold within itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.metrics.figures import (
    confidence_histogram,
    reliability_diagram,
    response_curve,
    risk_coverage_figure,
)
from vlm_calibration.metrics.table import ConfidenceTable
from vlm_calibration.reporting.report_data import System

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (5.2, 4.4)
"""Inches of a figure: small, so that its text can still be read on a telephone."""


class DrawnFigure(NamedTuple):
    """uri: the picture itself. caption: whose it is. text: what it shows, for those who cannot see it."""

    uri: str
    caption: str
    text: str


class FigurePanel(NamedTuple):
    """Figures of one kind side by side: a heading, how to read them, and one for each system."""

    heading: str
    how: str
    pictures: list[DrawnFigure]


def panels_of(systems: Sequence[System]) -> list[FigurePanel]:
    """Every kind of figure, for each system that has the answers for it."""
    found = [
        FigurePanel(
            "Reliability",
            "Answers are put in bins by what they state. A model whose word can be taken lies on the dashed line; below it "
            "is a model that promises too much.",
            [_picture(s, "reliability diagram", reliability_diagram, _table(s.predictions)) for s in systems],
        ),
        FigurePanel(
            "What is stated, and how often",
            "Right answers are drawn upwards, wrong ones downwards. Where both are at the same places, the number says nothing.",
            [
                _picture(s, "histogram of confidences", confidence_histogram, _table(s.predictions))
                for s in systems
            ],
        ),
        FigurePanel(
            "Answering only when sure",
            "The share of wrong answers among those given, if only the most confident are given. The lower, and the closer to "
            "the best possible ranking, the better.",
            [
                _picture(s, "risk-coverage curve", risk_coverage_figure, _table(s.predictions))
                for s in systems
            ],
        ),
    ]
    noised = [(s, _tables_by_step(s.predictions)) for s in systems]
    curves = [
        _picture(s, "response to noise", response_curve, tables) for s, tables in noised if len(tables) > 1
    ]
    if curves:
        how = (
            "The object asked about is replaced by noise, more of it to the right. Both curves should fall, and together: "
            "what is stated follows what can be seen."
        )
        found.append(FigurePanel("Response to noise on the evidence", how, curves))
    return found


def _picture(system: System, kind: str, draw: Callable[..., Any], data: Any) -> DrawnFigure:
    return DrawnFigure(picture_of(lambda ax: draw(data, ax=ax)), system.name, f"{system.name}: {kind}")


def picture_of(draw: Callable[[Axes], object]) -> str:
    """What is drawn into axes, as an SVG in a data URI; the same for the same drawing."""
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
    """A file as an address that is the file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _table(predictions: Sequence[EstimatedPrediction]) -> ConfidenceTable:
    return ConfidenceTable.from_predictions(
        [p.confidence for p in predictions], [p.correct for p in predictions]
    )


def _tables_by_step(predictions: Sequence[EstimatedPrediction]) -> dict[int, ConfidenceTable]:
    """A table for each noise step, of those parts of the data in which anything was noised."""
    noised = {_part(p) for p in predictions if p.noise_step}
    steps: dict[int, list[EstimatedPrediction]] = {}
    for prediction in predictions:
        if prediction.noise_step is not None and _part(prediction) in noised:
            steps.setdefault(prediction.noise_step, []).append(prediction)
    return {step: _table(found) for step, found in sorted(steps.items())}


def _part(prediction: EstimatedPrediction) -> str:
    """An evaluation puts the part's name in front of the category."""
    return (prediction.category or "").split("/")[0]
