"""The answer of a calibrated model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_calibration.estimators.decision import AppliedRule, Decision
from vlm_calibration.estimators.predictions import VERBALIZED
from vlm_calibration.metrics.risk_control import percent
from vlm_calibration.records import AnswerType


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
        rule: the threshold that the confidence was compared with, and its guarantee; None if the model has no thresholds, or has them
            by category and none for this question's.
        warning: why answer and confidence mean nothing: what the model does not know in the question. None if it knows the
            question, and for any model but the demo's, since what others know is not known.
    """

    text: str
    answer: str
    confidence: float | None
    expected: float | None
    distribution: Mapping[float, float] = field(hash=False, repr=False)
    answer_type: AnswerType
    rule: AppliedRule | None = None
    warning: str | None = None

    @property
    def decision(self) -> Decision | None:
        """Whether the answer may be given, or goes to a person for review; None without a rule."""
        return None if self.rule is None else self.rule.decision

    @property
    def reason(self) -> str:
        """Why `decision` is what it is, as a clause; empty without a rule."""
        if self.rule is None:
            return ""
        name = "stated" if self.rule.estimator == VERBALIZED else self.rule.estimator
        if self.rule.unfamiliar is not None:
            return self.rule.unfamiliar
        if self.rule.confidence is None:
            return f"no {name} confidence"
        if self.rule.threshold is None:
            return "no threshold keeps the limits"
        relation = "at least" if self.decision == "answer" else "below"
        return f"{name} {percent(self.rule.confidence)}, {relation} {percent(self.rule.threshold)}"

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
            "decision": self.decision,
            "threshold": None if self.rule is None else self.rule.threshold,
            "unfamiliar": None if self.rule is None else self.rule.unfamiliar,
        }
