"""The answer of a calibrated model, and the choice of a confidence threshold for review."""

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
    """A confidence threshold, measured on the answers of an evaluation at or above it.

    Attributes:
        value: the threshold, a confidence in [0, 1].
        estimator: estimator of the confidence.
        accuracy: share of correct answers at or above the threshold.
        interval: 95% Wilson interval of the accuracy.
        coverage: share of all answers that are at or above the threshold.
        answers: number of answers at or above the threshold.
    """

    value: float
    estimator: str
    accuracy: float
    interval: tuple[float, float]
    coverage: float
    answers: int


@dataclass(frozen=True)
class Answer:
    """An answer with its confidence.

    Attributes:
        text: the output as generated.
        answer: the output without the statement of confidence.
        confidence: the stated confidence in [0, 1]; None if it could not be parsed.
        expected: mean of the confidences that the model might have stated after its answer, in [0, 1]; None without an
            answer. Greedy decoding states the most probable one.
        distribution: confidence -> probability that the model states it, highest confidence first; sums to 1.
        answer_type: the kind of question that the model was asked.
        warning: why answer and confidence mean nothing: what the model does not know in the question. None if it knows the
            question, and for any model but the demo's, since what others know is not known.
    """

    text: str
    answer: str
    confidence: float | None
    expected: float | None
    distribution: Mapping[float, float] = field(hash=False, repr=False)
    answer_type: AnswerType
    warning: str | None = None

    def confidence_of(self, estimator: str) -> float | None:
        """The stated confidence ("verbalized") or the expected one ("expected").

        Raises:
            ValueError: another estimator.
        """
        confidences = {VERBALIZED: self.confidence, EXPECTED: self.expected}
        if estimator not in confidences:
            raise ValueError(f"an answer has the confidences {', '.join(confidences)}, not {estimator!r}")
        return confidences[estimator]

    def needs_review(self, threshold: float | Threshold) -> bool:
        """Whether the answer's confidence is below a threshold or missing.

        Args:
            threshold: a stated confidence in [0, 1], or the result of `choose_threshold`.

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
        """The answer as plain values; the distribution as pairs of confidence and probability, without those below 0.1%."""
        return {
            "text": self.text,
            "answer": self.answer,
            "confidence": self.confidence,
            "expected": self.expected,
            "distribution": [[level, round(p, 6)] for level, p in self.distribution.items() if p >= 1e-3],
            "answer_type": self.answer_type,
            "warning": self.warning,
        }


def choose_threshold(evaluated: str | Path, accuracy: float, estimator: str = VERBALIZED) -> Threshold:
    """Choose the lowest confidence from which on the answers of an evaluation have a required accuracy.

    Args:
        evaluated: a `predictions.jsonl`, its folder, or the `metrics.json` beside it.
        accuracy: required share of correct answers at or above the threshold, in (0, 1].
        estimator: estimator of the confidence: "verbalized", or another key of the predictions such as "expected".

    Raises:
        DataError: there are no predictions, they lack the estimator, or no threshold reaches the accuracy.
    """
    if not 0 < accuracy <= 1:
        raise DataError(f"the required accuracy must be in (0, 1], found {accuracy}")
    path = _predictions_path(Path(evaluated))
    predictions = read_predictions(path)
    if estimator not in (estimators := estimators_of(predictions)):
        raise DataError(f"{path}: no estimator {estimator!r}; it has {', '.join(estimators)}")
    levels = group_values(*_confidences(predictions, estimator))
    # Counts of the answers at or above each level, from the highest level down.
    answers, correct = levels.answers.flip(-1).cumsum(-1), levels.correct.flip(-1).cumsum(-1)
    reached = (correct / answers >= accuracy - 1e-12).nonzero()[:, 0]
    if not len(reached):
        raise DataError(
            f"{path}: {_most_accurate(levels.value.flip(-1), correct / answers)}, less than {accuracy:.1%}"
        )
    last = int(reached[-1])
    low, high = wilson_interval(correct[last], answers[last])
    return Threshold(
        value=float(levels.value.flip(-1)[last]),
        estimator=estimator,
        accuracy=float(correct[last] / answers[last]),
        interval=(float(low), float(high)),
        coverage=float(answers[last]) / len(predictions),
        answers=int(answers[last]),
    )


def _predictions_path(path: Path) -> Path:
    if path.is_dir():
        return path / PREDICTIONS
    # Metrics are aggregates; the single answers are in the file beside them.
    return path.with_name(PREDICTIONS) if path.suffix == ".json" else path


def _confidences(predictions: list[EstimatedPrediction], estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence and correctness of the answers with a confidence, float64 [N] and bool [N]."""
    rows = [(c, p.correct) for p in predictions if (c := p.confidence_of(estimator)) is not None]
    return (
        torch.tensor([c for c, _ in rows], dtype=torch.float64),
        torch.tensor([correct for _, correct in rows], dtype=torch.bool),
    )


def _most_accurate(values: torch.Tensor, accuracies: torch.Tensor) -> str:
    """The most accurate threshold and its accuracy, as text."""
    if not len(values):
        return "no answer has a confidence that could be parsed"
    best = int(accuracies.argmax())
    return f"the most accurate threshold, {float(values[best]):.2f}, is right {float(accuracies[best]):.1%} of the time"
