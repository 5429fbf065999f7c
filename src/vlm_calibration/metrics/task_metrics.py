"""The task metrics as torchmetrics: one class for each metric of `TASK_METRICS`, and `TaskMetrics`, all of them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_calibration.metrics.counting import Category, CountingMetric, SharedStateCollection, class_of
from vlm_calibration.metrics.groups import check_correct
from vlm_calibration.metrics.task import SHAPE, TASK_METRICS, TaskTable, check_positive, count_answers


class TaskMetric(CountingMetric):
    """Base class of the task metrics.

    Args:
        positive: the positive class of precision, recall and F1, `yes` or `no`.
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
        category: Sequence[Category] | None = None,
    ) -> None:
        """Count N answers.

        Args:
            predicted: N parsed answers, None where none could be parsed.
            answer: N gold answers.
            correct: bool [N], for the accuracy.
            category: as for `CalibrationMetric.update`.

        Raises:
            ValueError: if the lengths differ, `correct` is not bool, or a category was not declared.
        """
        correct = check_correct(correct, torch.Size([len(answer)]))
        cells = count_answers(predicted, answer, correct, *self.rows(category, len(answer)), len(self.counts))
        self.counts = self.counts + cells.to(self.counts.device)

    def tables(self) -> dict[str, TaskTable]:
        """The task tables of this process by suffix: all answers under the empty one, then `/category`."""
        return {suffix: TaskTable(counts) for suffix, counts in self.by_category().items()}

    def evaluate(self, table: TaskTable) -> Tensor:
        """The metric on one table, a float64 scalar, NaN where undefined, without a warning."""
        return torch.tensor(self.spec.function(table, self.positive), dtype=torch.float64)


TASK_CLASSES: dict[str, type[TaskMetric]] = {
    name: class_of(spec, TaskMetric, __name__) for name, spec in TASK_METRICS.items()
}
"""The class of each task metric by its flat name."""

globals().update({cls.__name__: cls for cls in TASK_CLASSES.values()})

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[TaskMetric]:
        """The generated classes, for type checkers."""
        ...


class TaskMetrics(SharedStateCollection):
    """Accuracy over all answers; precision, recall, F1 and yes ratio over the yes/no questions.

    Args:
        positive: the positive class of precision, recall and F1, `yes` or `no`.
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
