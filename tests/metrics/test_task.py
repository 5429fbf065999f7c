"""Task metrics against scikit-learn and by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from vlm_calibration.metrics.task import count_answers, task_scores


def test_task_metrics_against_sklearn():
    rng = np.random.default_rng(0)
    for _ in range(25):
        n = int(rng.integers(1, 40))
        gold = rng.choice(["yes", "no"], size=n)
        predicted = rng.choice(["yes", "no", "maybe"], size=n, p=rng.dirichlet([1, 1, 0.5]))
        scores = task_scores(count_answers(predicted.tolist(), gold.tolist(), gold == predicted))
        y, x = gold == "yes", predicted == "yes"
        assert scores["accuracy"] == pytest.approx((gold == predicted).mean())
        assert scores["precision"] == pytest.approx(precision_score(y, x, zero_division=np.nan), nan_ok=True)
        assert scores["recall"] == pytest.approx(recall_score(y, x, zero_division=np.nan), nan_ok=True)
        assert scores["f1"] == pytest.approx(f1_score(y, x, zero_division=np.nan), nan_ok=True)
        assert scores["yes_ratio"] == pytest.approx(x.mean())


def test_open_questions_count_in_the_accuracy_only():
    """An unparsed answer is negative and stays in the ratio."""
    counts = count_answers(
        ["yes", "Yes.", None, "no", "a red bus", None],
        ["yes", "no", " YES ", "No", "a red bus", "seven"],
        [True, False, False, True, True, False],
    )
    assert task_scores(counts, "/a") == pytest.approx(
        {"accuracy/a": 3 / 6, "precision/a": 1 / 2, "recall/a": 1 / 2, "f1/a": 1 / 2, "yes_ratio/a": 2 / 4}
    )


def test_the_yes_ratio_is_that_of_the_predictions():
    """Everything answered no to questions of which half are yes: 0, not 0.5."""
    scores = task_scores(count_answers(["no"] * 4, ["yes", "no"] * 2, [False, True] * 2))
    assert scores["yes_ratio"] == 0
    assert math.isnan(scores["precision"])
    assert scores["recall"] == scores["f1"] == 0


def test_answers_of_different_numbers_are_refused():
    with pytest.raises(ValueError, match="got 1 predicted, 2 answers"):
        count_answers(["yes"], ["no", "no"], [True, True])
