"""`Answer`, and the decision about it."""

from __future__ import annotations

import json

import pytest

from vlm_calibration.estimators.decision import AppliedRule
from vlm_calibration.inference.answers import Answer


@pytest.mark.parametrize(
    ("threshold", "confidence", "decision"),
    [
        (0.8, 0.8, "answer"),
        (0.801, 0.8, "review"),
        (0.0, None, "review"),
        (None, 1.0, "review"),
        (0.0, 0.0, "answer"),
    ],
)
def test_the_decision(threshold: float | None, confidence: float | None, decision: str) -> None:
    rule = AppliedRule(threshold, "verbalized", confidence, "", "At most 5% ...")
    assert rule.decision == decision
    answer = Answer("Yes", "Yes", confidence, None, {}, "yes_no", rule)
    assert (answer.decision, answer.to_dict()["decision"]) == (decision, decision)
    assert answer.to_dict()["threshold"] == threshold


def test_as_json() -> None:
    answer = Answer("Yes", "Yes", None, 0.5, {1.0: 0.5, 0.5: 0.00001, 0.0: 0.49999}, "short")
    assert json.loads(json.dumps(answer.to_dict())) == {
        "text": "Yes",
        "answer": "Yes",
        "confidence": None,
        "expected": 0.5,
        "distribution": [[1.0, 0.5], [0.0, 0.49999]],
        "answer_type": "short",
        "decision": None,
        "threshold": None,
    }


def test_an_answer_s_text_is_short() -> None:
    levels = {i / 100: 0.01 for i in range(100, -1, -1)}
    answer = Answer("Yes. Confidence: 90%", "Yes", 0.9, 0.87, levels, "yes_no")
    assert repr(answer) == (
        "Answer(text='Yes. Confidence: 90%', answer='Yes', confidence=0.9, expected=0.87, answer_type='yes_no', rule=None)"
    )
