"""Flat names of metrics.json from tables; task metrics against scikit-learn."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score

from vlm_calibration.metrics.functional import METRICS, REPORTED
from vlm_calibration.metrics.summary import summarize
from vlm_calibration.metrics.table import ConfidenceTable
from vlm_calibration.metrics.task import TaskTable, task_scores

NAMES = [
    "n",
    "ece",
    "ace",
    "mce",
    "brier",
    "brier_reliability",
    "brier_resolution",
    "brier_uncertainty",
    "log_loss",
    "auroc",
    "aurc",
    "smooth_ece",
    "mean_confidence",
    "overconfidence",
    "parse_failure_rate",
]
TASK_NAMES = ["accuracy", "precision", "recall", "f1", "yes_ratio"]


def test_names():
    table = ConfidenceTable.from_predictions([0.9, 0.3, None], [True, False, True])
    task = TaskTable.from_predictions(["yes", "no", None], ["yes", "yes", "no"], [True, False, False])
    assert list(REPORTED) == NAMES
    assert list(summarize(table)) == NAMES
    assert list(summarize(task=task)) == TASK_NAMES
    values = summarize(table, task, categories={"a/b": table, "c": table}, task_categories={"c": task})
    assert set(values) == {
        *NAMES,
        *TASK_NAMES,
        *(f"{name}/{c}" for name in NAMES for c in ("a/b", "c")),
        *(f"{name}/c" for name in TASK_NAMES),
    }
    assert all(type(value) is float for value in values.values())
    assert values["n"] == 3
    assert values["parse_failure_rate"] == pytest.approx(1 / 3)
    assert values["overconfidence"] == pytest.approx(0.6 - 0.5)


def test_values_are_those_of_the_metrics(cases):
    for percent, correct in cases(40, "percents", seed=71):
        table = ConfidenceTable.from_predictions(torch.tensor(percent / 100), torch.tensor(correct))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = summarize(table, metrics=METRICS)
        assert values == pytest.approx({name: float(METRICS[name](table)) for name in METRICS}, nan_ok=True)


def test_one_warning_for_all_that_is_undefined():
    table = ConfidenceTable.from_predictions([0.9, 0.8], [True, True])
    task = TaskTable.from_predictions(["red"], ["red"], [True])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = summarize(table, task, categories={"x": ConfidenceTable.empty()})
    assert len(caught) == 1
    message = str(caught[0].message)
    for part in (
        "auroc, auroc/x: all answers are correct or all are wrong",
        "ece/x",
        "yes_ratio: there is no yes/no question",
    ):
        assert part in message
    assert math.isnan(values["auroc"])
    assert math.isnan(values["f1"])
    assert values["n/x"] == 0


def test_refusals():
    with pytest.raises(ValueError, match="unknown metric 'acc'; known are n, ece"):
        summarize(ConfidenceTable.empty(), metrics=["acc"])
    with pytest.raises(ValueError, match="non-empty"):
        summarize(ConfidenceTable.empty(), categories={"": ConfidenceTable.empty()})
    with pytest.raises(ValueError, match="positive must be yes or no"):
        summarize(task=TaskTable.from_predictions([], [], []), positive="Yes")


@pytest.mark.parametrize("positive", ["yes", "no"])
def test_task_metrics_against_sklearn(positive):
    rng = np.random.default_rng(0)
    for _ in range(25):
        n = int(rng.integers(1, 40))
        gold = rng.choice(["yes", "no"], size=n)
        predicted = rng.choice(["yes", "no", "maybe"], size=n, p=rng.dirichlet([1, 1, 0.5]))
        correct = torch.tensor(gold == predicted)
        scores = task_scores(
            TaskTable.from_predictions(predicted.tolist(), gold.tolist(), correct), positive=positive
        )
        y, x = gold == positive, predicted == positive
        assert scores["accuracy"] == pytest.approx((gold == predicted).mean())
        assert scores["precision"] == pytest.approx(precision_score(y, x, zero_division=np.nan), nan_ok=True)
        assert scores["recall"] == pytest.approx(recall_score(y, x, zero_division=np.nan), nan_ok=True)
        assert scores["f1"] == pytest.approx(f1_score(y, x, zero_division=np.nan), nan_ok=True)
        assert scores["yes_ratio"] == pytest.approx((predicted == "yes").mean())


def test_task_metrics_by_hand():
    """Two open questions count in the accuracy only; an unparsed answer is negative and stays in the ratio."""
    table = TaskTable.from_predictions(
        ["yes", "Yes.", None, "no", "a red bus", None],
        ["yes", "no", " YES ", "No", "a red bus", "seven"],
        torch.tensor([True, False, False, True, True, False]),
    )
    yes = task_scores(table)
    assert yes == pytest.approx(
        {"accuracy": 3 / 6, "precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "yes_ratio": 2 / 4}
    )
    no = task_scores(table, positive="no")
    assert no == pytest.approx(
        {"accuracy": 3 / 6, "precision": 1, "recall": 1 / 2, "f1": 2 / 3, "yes_ratio": 2 / 4}
    )


def test_the_yes_ratio_is_that_of_the_predictions():
    """Everything answered no to questions of which half are yes: 0, not 0.5."""
    table = TaskTable.from_predictions(["no"] * 4, ["yes", "no"] * 2, torch.tensor([False, True] * 2))
    scores = task_scores(table)
    assert scores["yes_ratio"] == 0
    assert math.isnan(scores["precision"])
    assert scores["recall"] == scores["f1"] == 0


def test_what_is_no_task_table_is_refused():
    with pytest.raises(ValueError, match="got 1 predicted, 2 answers"):
        TaskTable.from_predictions(["yes"], ["no", "no"], [True, True])
    with pytest.raises(ValueError, match="int64"):
        TaskTable(torch.zeros(3, 3, 2))
    with pytest.raises(ValueError, match="negative"):
        TaskTable(torch.full((3, 3, 2), -1))
