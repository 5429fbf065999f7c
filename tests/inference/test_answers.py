"""`Answer`, and the decision about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.decision import AppliedRule
from vlm_calibration.inference.asking import Answer
from vlm_calibration.inference.model import load_calibrated

from ..decision_rules import write_decision_rule


@pytest.mark.parametrize(
    ("threshold", "confidence", "decision", "reason"),
    [
        (0.925, 0.95, "answer", "stated 95%, at least 92.5%"),
        (0.8, 0.8, "answer", "stated 80%, at least 80%"),
        (0.801, 0.8, "review", "stated 80%, below 80.1%"),
        (0.0, None, "review", "no stated confidence"),
        (None, 1.0, "review", "no threshold keeps the limits"),
        (0.0, 0.0, "answer", "stated 0%, at least 0%"),
    ],
)
def test_the_decision_and_its_reason(
    threshold: float | None, confidence: float | None, decision: str, reason: str
) -> None:
    rule = AppliedRule(threshold, "verbalized", confidence, "", "At most 5% ...")
    answer = Answer("Yes", "Yes", confidence, None, {}, "yes_no", rule)
    assert (rule.decision, answer.decision, answer.reason) == (decision, decision, reason)
    assert (answer.to_dict()["decision"], answer.to_dict()["threshold"]) == (decision, threshold)


def test_as_json() -> None:
    answer = Answer("Yes", "Yes", None, 0.5, {1.0: 0.5, 0.5: 0.00001, 0.0: 0.49999}, "short")
    assert json.loads(json.dumps(answer.to_dict())) == {
        "text": "Yes",
        "answer": "Yes",
        "confidence": None,
        "expected": 0.5,
        "distribution": [[1.0, 0.5], [0.0, 0.49999]],
        "answer_type": "short",
        "warning": None,
        "decision": None,
        "threshold": None,
        "unfamiliar": None,
    }


def test_an_answer_s_text_is_short() -> None:
    levels = {i / 100: 0.01 for i in range(100, -1, -1)}
    answer = Answer("Yes. Confidence: 90%", "Yes", 0.9, 0.87, levels, "yes_no")
    assert repr(answer) == (
        "Answer(text='Yes. Confidence: 90%', answer='Yes', confidence=0.9, expected=0.87, answer_type='yes_no', "
        "rule=None, warning=None)"
    )


def test_the_expected_confidence_of_a_rule_is_that_of_the_evaluation(
    adapter_run: Path, tmp_path: Path
) -> None:
    source = DemoSource("test", scenes=2)
    asked = [(source.load(query).image, query.question) for query in source.queries()]
    folder = tmp_path / "adapter"
    shutil.copytree(adapter_run / "adapter", folder)
    write_decision_rule(folder, estimator="expected")
    deciding = load_calibrated(adapter=folder, device="cpu", max_new_tokens=16)
    for answer in deciding.ask_many(asked):
        assert answer.rule is not None
        assert answer.rule.confidence == round(answer.expected or 0, 6)
        assert answer.decision == ("answer" if (answer.expected or 0) >= 0.5 else "review")
    assert deciding.ask(*asked[0], as_base=True).decision is None
