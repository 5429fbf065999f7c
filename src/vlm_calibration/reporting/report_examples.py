"""The answers that a report shows one by one: where a model was surest and wrong, and where it doubted what was right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.reporting.report_data import System

SHOWN = 8
LONGEST = 240
"""Characters of an answer that are shown."""


class Example(NamedTuple):
    """An answer as it is shown.

    id, question, gold, text, category: of the prediction, the text cut short if it is long. stated: percent. noise: the
    diffusion step, None where noise does not apply. others: what other systems said, name -> text.
    """

    id: str
    question: str
    gold: str
    text: str
    category: str
    stated: str
    noise: int | None
    others: dict[str, str]


class Examples(NamedTuple):
    """The predictions behind all examples, and the examples: overconfident and underconfident ones."""

    predictions: list[EstimatedPrediction]
    overconfident: list[Example]
    underconfident: list[Example]


def examples_of(system: System, others: Sequence[System]) -> Examples:
    """The most confident wrong answers and the least confident right ones, one an image at most."""
    read = [p for p in system.predictions if p.confidence is not None]
    wrong = _first([p for p in read if not p.correct], lambda p: -(p.confidence or 0.0))
    right = _first([p for p in read if p.correct], lambda p: p.confidence or 0.0)
    return Examples(
        [*wrong, *right], [_example(p, others) for p in wrong], [_example(p, others) for p in right]
    )


def _first(
    predictions: Sequence[EstimatedPrediction], key: Callable[[EstimatedPrediction], float]
) -> list[EstimatedPrediction]:
    found: dict[str, EstimatedPrediction] = {}
    for prediction in sorted(predictions, key=lambda p: (key(p), p.id)):
        found.setdefault(prediction.image or prediction.id, prediction)
    return list(found.values())[:SHOWN]


def _example(prediction: EstimatedPrediction, others: Sequence[System]) -> Example:
    said = {s.name: _short(s.by_id[prediction.id].text) for s in others if prediction.id in s.by_id}
    return Example(
        prediction.id,
        prediction.question,
        prediction.answer,
        _short(prediction.text),
        prediction.category or "",
        f"{100 * (prediction.confidence or 0.0):.0f}%",
        prediction.noise_step,
        said,
    )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
