"""What a calibrated model says to a question, and from which confidence on it is taken at its word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlm_calibration.estimators.predictions import (
    VERBALIZED,
    EstimatedPrediction,
    estimators_of,
    read_predictions,
)
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.metrics.figures import wilson_interval
from vlm_calibration.metrics.groups import group_values
from vlm_calibration.records import AnswerType, DataError

EXPECTED = ExpectedConfidence.name
PREDICTIONS = "predictions.jsonl"


class Threshold(NamedTuple):
    """A confidence to answer from, and what was measured on the answers that reach it.

    value: the confidence, in [0, 1]. estimator: whose it is. accuracy: share of right answers among those that reach it,
    and interval: its 95% Wilson interval. coverage: the share of all answers that reach it. answers: how many those are.
    """

    value: float
    estimator: str
    accuracy: float
    interval: tuple[float, float]
    coverage: float
    answers: int


@dataclass(frozen=True)
class Answer:
    """An answer with the confidence in it.

    Attributes:
        text: the output as generated. answer: the same without the statement of confidence.
        confidence: as stated, in [0, 1]; None where none could be read.
        expected: the mean of all confidences that the model might have stated behind its answer, in [0, 1]; None where
            there is no answer. Greedy decoding states the most probable one.
        distribution: confidence -> the probability that it is the one stated, highest confidence first; they sum to 1. It
            is not in the text of an answer.
        answer_type: the kind of question that it was taken for.
    """

    text: str
    answer: str
    confidence: float | None
    expected: float | None
    distribution: Mapping[float, float] = field(hash=False, repr=False)
    answer_type: AnswerType

    def confidence_of(self, estimator: str) -> float | None:
        """The stated confidence ("verbalized") or the expected one ("expected").

        Raises:
            ValueError: another estimator.
        """
        known = {VERBALIZED: self.confidence, EXPECTED: self.expected}
        if estimator not in known:
            raise ValueError(f"an answer has the confidences {', '.join(known)}, not {estimator!r}")
        return known[estimator]

    def needs_review(self, threshold: float | Threshold) -> bool:
        """Whether the answer is not to be relied on: less confident than the threshold, or with no confidence to read.

        Args:
            threshold: the least stated confidence to rely on, in [0, 1], or what `choose_threshold` returns.

        Raises:
            ValueError: a threshold outside [0, 1].
        """
        value, estimator = (
            (threshold.value, threshold.estimator)
            if isinstance(threshold, Threshold)
            else (threshold, VERBALIZED)
        )
        if not 0 <= value <= 1:
            raise ValueError(f"a threshold is a confidence in [0, 1], found {value}")
        confidence = self.confidence_of(estimator)
        return confidence is None or confidence < value

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; the distribution as pairs of confidence and probability, those below 0.1% left out."""
        return {
            "text": self.text,
            "answer": self.answer,
            "confidence": self.confidence,
            "expected": self.expected,
            "distribution": [[level, round(p, 6)] for level, p in self.distribution.items() if p >= 1e-3],
            "answer_type": self.answer_type,
        }


def choose_threshold(evaluated: str | Path, accuracy: float, estimator: str = VERBALIZED) -> Threshold:
    """The lowest confidence from which on at least a wanted share of the answers of an evaluation is right.

    Args:
        evaluated: a `predictions.jsonl`, the folder that holds one, or the `metrics.json` beside one.
        accuracy: wanted share of right answers among those that reach the threshold, in (0, 1].
        estimator: whose confidence: "verbalized", or another key of the predictions such as "expected".

    Raises:
        DataError: there are no predictions, they lack the estimator, or no threshold is that accurate.
    """
    if not 0 < accuracy <= 1:
        raise DataError(f"the wanted accuracy must be in (0, 1], found {accuracy}")
    path = _predictions(Path(evaluated))
    predictions = read_predictions(path)
    if estimator not in (known := estimators_of(predictions)):
        raise DataError(f"{path}: no estimator {estimator!r}; it has {', '.join(known)}")
    levels = group_values(*_confident(predictions, estimator))
    # From the most confident down: all who reach each level.
    answers, right = levels.answers.flip(-1).cumsum(-1), levels.correct.flip(-1).cumsum(-1)
    reached = (right / answers >= accuracy - 1e-12).nonzero()[:, 0]
    if not len(reached):
        raise DataError(f"{path}: {_best(levels.value.flip(-1), right / answers)}, less than {accuracy:.1%}")
    last = int(reached[-1])
    low, high = wilson_interval(right[last], answers[last])
    return Threshold(
        value=float(levels.value.flip(-1)[last]),
        estimator=estimator,
        accuracy=float(right[last] / answers[last]),
        interval=(float(low), float(high)),
        coverage=float(answers[last]) / len(predictions),
        answers=int(answers[last]),
    )


def _predictions(path: Path) -> Path:
    if path.is_dir():
        return path / PREDICTIONS
    # Metrics are of all answers together; which of them were right is beside them.
    return path.with_name(PREDICTIONS) if path.suffix == ".json" else path


def _confident(predictions: list[EstimatedPrediction], estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence and correctness of the answers that have a confidence, float64 [N] and bool [N]."""
    rows = [(c, p.correct) for p in predictions if (c := p.confidence_of(estimator)) is not None]
    return (
        torch.tensor([c for c, _ in rows], dtype=torch.float64),
        torch.tensor([right for _, right in rows], dtype=torch.bool),
    )


def _best(values: torch.Tensor, accuracies: torch.Tensor) -> str:
    """What the most accurate threshold reaches, as text."""
    if not len(values):
        return "no answer has a confidence that could be read"
    best = int(accuracies.argmax())
    return f"the most accurate threshold, {float(values[best]):.2f}, is right {float(accuracies[best]):.1%} of the time"
