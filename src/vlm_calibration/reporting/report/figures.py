"""The report's figures, as SVG in data URIs that the page embeds."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.metrics.figures import (
    BLUE,
    FEW,
    GREEN,
    GREY,
    ORANGE,
    ResponseTables,
    confidence_histogram,
    reliability_diagram,
    response_curve,
    risk_coverage_figure,
)
from vlm_calibration.metrics.table import PROBABILITY_STEPS, ConfidenceTable
from vlm_calibration.reporting.report.data import System
from vlm_calibration.reporting.report.thresholds import CURVE, SystemPromises

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (5.2, 4.4)
"""Width and height of a figure in inches: small, so that its text stays readable on a phone."""


PALETTE = (ORANGE, BLUE, GREEN, "#CC79A7", GREY, "#E69F00", "#56B4E9")
"""Colours of lines (Okabe & Ito, 2008)."""
DASHES = ("-", "--", "-.", ":")
"""Their styles: no two of the first 28 lines have both in common."""


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
        FigurePanel(
            "histogram",
            "Which confidences are stated, and how often",
            "Correct answers are drawn upwards, wrong ones downwards. If both have the same shape, confidence carries no "
            "information.",
            [
                _draw(s, "histogram of confidences", confidence_histogram, _table(s.predictions))
                for s in systems
            ],
        ),
        FigurePanel(
            "coverage",
            "Answering only when sure",
            "The share of wrong answers if only the most confident answers are given. The lower, and the closer to the best "
            "possible ranking, the better.",
            [_draw(s, "risk-coverage curve", risk_coverage_figure, _table(s.predictions)) for s in systems],
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


def thresholds_picture(rows: Sequence[SystemPromises]) -> DrawnFigure:
    """The share of the answers that each system gives, against the limit of the error; a line a system, which differ in their dashes too."""

    def draw(ax: Axes) -> None:
        limits = [100 * limit for limit in CURVE]
        for number, row in enumerate(rows):
            colour = PALETTE[number % len(PALETTE)]
            style = DASHES[number % len(DASHES)]
            ax.plot(
                limits,
                [100 * share for share in row.curve],
                style,
                color=colour,
                linewidth=1.8,
                label=row.name,
            )
        ax.set(
            xlabel="Limit of the error (%)", ylabel="Answers given (%)", xlim=(0, limits[-1]), ylim=(-3, 103)
        )
        ax.grid(alpha=0.25)
        ax.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none")

    return DrawnFigure(
        picture_of(draw),
        "Answers given at each limit",
        "answers given against the limit of the error: " + ", ".join(row.name for row in rows),
    )


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
