"""The task metrics as torchmetrics, and `TaskMetrics`, all of them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_calibration.metrics.counting import CountingMetric, SharedStateCollection
from vlm_calibration.metrics.task import SHAPE, TaskTable, check_positive, count_answers, task_scores


class TaskMetric(CountingMetric):
    """Base of the task metrics: `name` picks the value.

    Args:
        positive: the class that precision, recall and F1 are about, `yes` or `no`.
        categories: as for `CalibrationMetric`.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: on another `positive`, an empty or repeated category.
    """

    def __init__(self, positive: str = "yes", categories: Iterable[str] | None = None, **kwargs: Any) -> None:
        """See the class."""
        check_positive(positive)
        super().__init__(SHAPE, categories, **kwargs)
        self.positive = positive

    def update(
        self,
        predicted: Sequence[str | None],
        answer: Sequence[str],
        correct: Tensor,
        category: Sequence[str | None] | None = None,
    ) -> None:
        """Count N answers.

        Args:
            predicted: N parsed answers, None where none could be parsed.
            answer: N gold answers.
            correct: `(N,)` bool, for the accuracy.
            category: N names (None for an answer without), if the metric has categories.

        Raises:
            ValueError: if the lengths differ, `correct` is not bool, or a category was not declared.
        """
        row = self.rows(category, len(answer))
        row = row if row is None else row.to(correct.device)
        counted = count_answers(predicted, answer, correct, row, len(self.counts))
        self.counts = self.counts + counted.to(self.counts.device)

    def tables(self) -> dict[str, TaskTable]:
        """The task tables by suffix: all answers under the empty one, then `/category`; of this process alone."""
        return {suffix: TaskTable(counts) for suffix, counts in self.by_category().items()}

    def evaluate(self, table: TaskTable) -> Tensor:
        """The metric on one table, a float64 scalar, NaN where undefined, without a warning."""
        return torch.tensor(task_scores(table, positive=self.positive)[self.name], dtype=torch.float64)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values, by default the current one; returns the figure and its axes."""
        return self._plot(self.compute() if val is None else val, ax)


class AnswerAccuracy(TaskMetric):
    """Share of right answers, over all of them."""

    name = "accuracy"
    higher_is_better = True


class YesNoPrecision(TaskMetric):
    """Precision of the positive class over the yes/no questions."""

    name = "precision"
    higher_is_better = True


class YesNoRecall(TaskMetric):
    """Recall of the positive class over the yes/no questions."""

    name = "recall"
    higher_is_better = True


class YesNoF1(TaskMetric):
    """F1 of the positive class over the yes/no questions."""

    name = "f1"
    higher_is_better = True


class YesRatio(TaskMetric):
    """Share of the yes/no questions that are answered yes."""

    name = "yes_ratio"


TASK_CLASSES: dict[str, type[TaskMetric]] = {
    cls.name: cls for cls in (AnswerAccuracy, YesNoPrecision, YesNoRecall, YesNoF1, YesRatio)
}
"""The class of each task metric by its flat name."""


class TaskMetrics(SharedStateCollection):
    """Accuracy over all answers; precision, recall, F1 and yes ratio over the yes/no questions.

    Args:
        positive: the class that precision, recall and F1 are about, `yes` or `no`.
        prefix: put before every key.
        postfix: put after every key, category included.
        categories: names to break down by; None for no breakdown.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: on another `positive`, an empty or repeated category.
    """

    def __init__(
        self,
        positive: str = "yes",
        prefix: str | None = None,
        postfix: str | None = None,
        categories: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        categories = categories if categories is None or isinstance(categories, str) else tuple(categories)
        options = {"positive": positive, "categories": categories, **kwargs}
        super().__init__({name: cls(**options) for name, cls in TASK_CLASSES.items()}, prefix, postfix)
