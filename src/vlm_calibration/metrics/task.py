"""Task metrics beside the calibration metrics: accuracy over all answers, and yes/no metrics with a positive class.

The state is a small table of counts: (gold, predicted, correct) with gold and predicted one of yes, no, other. Precision,
recall, F1 and yes ratio are over the yes/no questions, whose gold answer is yes or no. A prediction that is neither
counts as negative, and stays in the denominator of the yes ratio.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_calibration.metrics.groups import MetricSpec, check_correct

CLASSES = ("yes", "no")
OTHER = 2
SHAPE = (3, 3, 2)


def class_of_answer(answer: str | None) -> int:
    """0 for yes, 1 for no, 2 for anything else; case, outer spaces and a final period do not matter."""
    if answer is None:
        return OTHER
    word = answer.strip().rstrip(".").casefold()
    return CLASSES.index(word) if word in CLASSES else OTHER


def check_positive(positive: str) -> None:
    """Raise a ValueError unless `positive` is yes or no."""
    if positive not in CLASSES:
        raise ValueError(f"positive must be yes or no, got {positive!r}")


def count_answers(
    predicted: Sequence[str | None],
    answer: Sequence[str],
    correct: Tensor,
    index: Tensor | None = None,
    row: Tensor | None = None,
    rows: int = 1,
) -> Tensor:
    """Count answers by row, gold class, predicted class and correctness with one `bincount`.

    Args:
        predicted: N parsed answers, None where none could be parsed.
        answer: N gold answers.
        correct: bool [N].
        index: int64 [M] in [0, N), the answers to count; None for each of them once.
        row: int64 [M] in [0, rows), the row of each; None for row 0.
        rows: number of rows.

    Returns:
        int64 [rows, 3, 3, 2] on the device of `correct`.

    Raises:
        ValueError: if the lengths differ or `correct` is not bool.
    """
    if not len(predicted) == len(answer) == len(correct):
        raise ValueError(f"got {len(predicted)} predicted, {len(answer)} answers and {len(correct)} correct")
    correct = check_correct(correct, torch.Size([len(answer)]))
    pairs = [class_of_answer(a) * 3 + class_of_answer(p) for p, a in zip(predicted, answer, strict=True)]
    cell = torch.tensor(pairs, dtype=torch.int64, device=correct.device) * 2 + correct
    if index is not None:
        cell = cell[index.to(cell.device)]
    if row is not None:
        cell = cell + row.to(cell.device) * math.prod(SHAPE)
    return torch.bincount(cell, minlength=rows * math.prod(SHAPE)).view(rows, *SHAPE)


@dataclass(frozen=True, eq=False)
class TaskTable:
    """Counts of (gold, predicted, correct).

    Attributes:
        counts: int64 [3, 3, 2] on the CPU; gold and predicted are yes, no, other, in this order.

    Raises:
        ValueError: on another shape or dtype, or a negative count.
    """

    counts: Tensor

    def __post_init__(self) -> None:
        """Check the invariants and take a private copy on the CPU."""
        if tuple(self.counts.shape) != SHAPE or self.counts.dtype != torch.int64:
            raise ValueError(
                f"counts must be int64 of shape {SHAPE}, got {self.counts.dtype} {self.counts.shape}"
            )
        if int(self.counts.min()) < 0:
            raise ValueError("counts must not be negative")
        object.__setattr__(self, "counts", self.counts.detach().cpu().clone())

    @classmethod
    def empty(cls) -> "TaskTable":
        """A table of no answers, the neutral element of `+`."""
        return cls(torch.zeros(SHAPE, dtype=torch.int64))

    @classmethod
    def from_predictions(
        cls, predicted: Sequence[str | None], answer: Sequence[str], correct: Tensor | Sequence[bool]
    ) -> "TaskTable":
        """Count N answers; see `count_answers`."""
        if not isinstance(correct, Tensor):
            correct = torch.tensor(list(correct), dtype=torch.bool)
        return cls(count_answers(predicted, answer, correct)[0])

    def __add__(self, other: "TaskTable") -> "TaskTable":
        """The table of both sets of answers."""
        return TaskTable(self.counts + other.counts) if isinstance(other, TaskTable) else NotImplemented

    def __radd__(self, other: object) -> "TaskTable":
        """Support `sum(tables)`, which starts from 0."""
        return self if other == 0 else NotImplemented

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same counts."""
        return torch.equal(self.counts, other.counts) if isinstance(other, TaskTable) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def yes_no(self) -> Tensor:
        """Answers to yes/no questions by gold class (yes, no) and predicted class (yes, no, other), int64 [2, 3]."""
        return self.counts.sum(-1)[:OTHER]


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    return float(numerator.double() / denominator) if int(denominator) else math.nan


def accuracy(table: TaskTable, positive: str = "yes") -> float:
    """Share of correct answers, over all of them."""
    return _ratio(table.counts[..., 1].sum(), table.counts.sum())


def precision(table: TaskTable, positive: str = "yes") -> float:
    """Precision of the positive class over the yes/no questions."""
    k = CLASSES.index(positive)
    return _ratio(table.yes_no[k, k], table.yes_no[:, k].sum())


def recall(table: TaskTable, positive: str = "yes") -> float:
    """Recall of the positive class over the yes/no questions."""
    k = CLASSES.index(positive)
    return _ratio(table.yes_no[k, k], table.yes_no[k].sum())


def f1(table: TaskTable, positive: str = "yes") -> float:
    """F1 of the positive class over the yes/no questions."""
    k = CLASSES.index(positive)
    return _ratio(2 * table.yes_no[k, k], table.yes_no[:, k].sum() + table.yes_no[k].sum())


def yes_ratio(table: TaskTable, positive: str = "yes") -> float:
    """Share of the yes/no questions that are answered yes, whatever the positive class."""
    return _ratio(table.yes_no[:, 0].sum(), table.yes_no.sum())


TASK_METRICS: dict[str, MetricSpec] = {
    spec.name: spec
    for spec in (
        MetricSpec("accuracy", accuracy, "accuracy", "there is no answer", True, class_name="AnswerAccuracy"),
        MetricSpec(
            "precision",
            precision,
            "precision",
            "the positive class was never predicted on a yes/no question",
            True,
            class_name="YesNoPrecision",
        ),
        MetricSpec(
            "recall",
            recall,
            "recall",
            "the positive class is the gold answer of no question",
            True,
            class_name="YesNoRecall",
        ),
        MetricSpec(
            "f1",
            f1,
            "F1",
            "the positive class was neither predicted nor a gold answer",
            True,
            class_name="YesNoF1",
        ),
        MetricSpec("yes_ratio", yes_ratio, "yes ratio", "there is no yes/no question"),
    )
}
"""The declarations of the task metrics by flat name; their functions take (table, positive)."""


def task_scores(table: TaskTable, *, positive: str = "yes") -> dict[str, float]:
    """The task metrics of a table by flat name, NaN where undefined, without a warning.

    Args:
        table: the counts.
        positive: `yes` or `no`.

    Raises:
        ValueError: if `positive` is neither.
    """
    check_positive(positive)
    return {name: spec.function(table, positive) for name, spec in TASK_METRICS.items()}
