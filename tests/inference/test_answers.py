"""`Answer.needs_review`, and `choose_threshold` on the predictions of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_calibration.inference.answers import Answer, Threshold, choose_threshold
from vlm_calibration.records import DataError

ANSWER = Answer("Yes. Confidence: 80%", "Yes.", 0.8, 0.72, {0.8: 0.6, 0.6: 0.4}, "yes_no")


def _write(folder: Path, rows: list[tuple[float | None, bool]], **more: Any) -> Path:
    """Writes predictions with given confidences, correct or wrong."""
    plain = {"question": "A dog?", "answer": "Yes", "text": "", "predicted": None, "category": None}
    plain |= {"noise_step": None, "answer_type": "yes_no"}
    lines = [
        json.dumps({"id": str(i), **plain, "confidence": c, "correct": right, **more})
        for i, (c, right) in enumerate(rows)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    ("answer", "threshold", "expected"),
    [
        (ANSWER, 0.8, False),
        (ANSWER, 0.81, True),
        (ANSWER, 0.0, False),
        (ANSWER, Threshold(0.75, "expected", 0.9, (0.8, 1.0), 0.5, 10), True),
        (ANSWER, Threshold(0.75, "verbalized", 0.9, (0.8, 1.0), 0.5, 10), False),
        (Answer("Yes", "Yes", None, 0.9, {}, "yes_no"), 0.0, True),
    ],
)
def test_needs_review(answer: Answer, threshold: Any, expected: bool) -> None:
    assert answer.needs_review(threshold) is expected


def test_what_is_no_threshold_is_refused() -> None:
    for value in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"a confidence in \[0, 1\]"):
            ANSWER.needs_review(value)
    with pytest.raises(ValueError, match="not 'p_true'"):
        ANSWER.needs_review(Threshold(0.5, "p_true", 0.9, (0.8, 1.0), 0.5, 10))


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
    }


def test_a_threshold_by_hand(tmp_path: Path) -> None:
    rows = [(0.9, True)] * 9 + [(0.9, False)] + [(0.6, True)] * 1 + [(0.6, False)] * 9 + [(None, True)] * 5
    folder = _write(tmp_path / "run", rows)
    threshold = choose_threshold(folder, 0.9)
    assert threshold._replace(interval=(0, 0)) == Threshold(0.9, "verbalized", 0.9, (0, 0), 10 / 25, 10)
    # Wilson interval by its formula: (0.9 + z^2/20 +- z sqrt(0.009 + z^2/400)) / (1 + z^2/10).
    assert threshold.interval == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert choose_threshold(folder / "predictions.jsonl", 0.5).value == 0.6
    assert choose_threshold(folder / "metrics.json", 0.5).answers == 20


@pytest.mark.parametrize("seed", range(15))
def test_thresholds_are_the_lowest_that_do(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    accuracy = (0.5, 0.8, 0.95)[seed % 3]
    confidence = rng.integers(0, 101, 60) / 100
    right = rng.random(60) < confidence
    reached = [v for v in sorted(set(confidence)) if right[confidence >= v].mean() >= accuracy - 1e-12]
    folder = _write(tmp_path, [(float(c), bool(r)) for c, r in zip(confidence, right, strict=True)])
    if reached:
        assert choose_threshold(folder, accuracy).value == reached[0]
    else:
        with pytest.raises(DataError, match="the most accurate threshold"):
            choose_threshold(folder, accuracy)


def test_another_estimator(tmp_path: Path) -> None:
    folder = _write(tmp_path / "run", [(0.9, True), (0.9, False)], expected=0.4)
    assert choose_threshold(folder, 0.5, "expected").value == 0.4
    with pytest.raises(DataError, match="no estimator 'p_true'; it has verbalized, expected"):
        choose_threshold(folder, 0.5, "p_true")


def test_what_has_no_threshold_is_named(tmp_path: Path) -> None:
    folder = _write(tmp_path / "run", [(0.9, True), (0.9, False), (0.4, False)])
    with pytest.raises(
        DataError, match=r"the most accurate threshold, 0.90, is right 50.0% of the time, less than 95.0%"
    ):
        choose_threshold(folder, 0.95)
    with pytest.raises(DataError, match="no answer has a confidence that could be parsed, less than"):
        choose_threshold(_write(tmp_path / "none", [(None, True)]), 0.95)
    for accuracy in (0.0, 1.1):
        with pytest.raises(DataError, match=r"must be in \(0, 1\]"):
            choose_threshold(folder, accuracy)
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        choose_threshold(tmp_path / "nowhere", 0.9)


def test_an_answer_s_text_is_short() -> None:
    levels = {i / 100: 0.01 for i in range(100, -1, -1)}
    answer = Answer("Yes. Confidence: 90%", "Yes", 0.9, 0.87, levels, "yes_no")
    assert repr(answer) == (
        "Answer(text='Yes. Confidence: 90%', answer='Yes', confidence=0.9, expected=0.87, answer_type='yes_no', "
        "warning=None)"
    )
