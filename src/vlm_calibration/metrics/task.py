"""Task metrics beside the calibration metrics: accuracy over all answers, and yes/no metrics with a named class.

State is again a small table of counts: (gold, predicted, correct) with gold and predicted one of yes, no, other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_calibration.metrics.groups import check_correct

CLASSES = ("yes", "no")
OTHER = 2
SHAPE = (3, 3, 2)
TASK_METRICS: dict[str, bool | None] = {
    "accuracy": True,
    "precision": True,
    "recall": True,
    "f1": True,
    "yes_ratio": None,
}
"""Names of the task metrics and whether higher is better."""

UNDEFINED = {
    "accuracy": "there is no answer",
    "precision": "the positive class was never predicted on a yes/no question",
    "recall": "the positive class is the gold answer of no question",
    "f1": "the positive class was neither predicted nor a gold answer",
    "yes_ratio": "there is no yes/no question",
}


def class_of(answer: str | None) -> int:
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
    row: Tensor | None = None,
    rows: int = 1,
) -> Tensor:
    """Count answers by row, gold class, predicted class and correctness with one `bincount`.

    Args:
        predicted: N parsed answers, None where none could be parsed.
        answer: N gold answers.
        correct: `(N,)` bool.
        row: `(N,)` int64 in [0, rows), or None for row 0.
        rows: number of rows.

    Returns:
        `(rows, 3, 3, 2)` int64 on the device of `correct`.

    Raises:
        ValueError: if the lengths differ or `correct` is not bool.
    """
    if not len(predicted) == len(answer) == len(correct):
        raise ValueError(f"got {len(predicted)} predicted, {len(answer)} answers and {len(correct)} correct")
    correct = check_correct(correct, torch.Size([len(answer)]))
    pairs = [class_of(a) * 3 + class_of(p) for p, a in zip(predicted, answer, strict=True)]
    index = torch.tensor(pairs, dtype=torch.int64, device=correct.device) * 2 + correct
    if row is not None:
        index = index + row * math.prod(SHAPE)
    return torch.bincount(index, minlength=rows * math.prod(SHAPE)).view(rows, *SHAPE)


@dataclass(frozen=True, eq=False)
class TaskTable:
    """Counts of (gold, predicted, correct).

    Attributes:
        counts: `(3, 3, 2)` int64 on the CPU; gold and predicted are yes, no, other, in this order.

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
        """Let `sum(tables)` work, which starts from 0."""
        return self if other == 0 else NotImplemented

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same counts."""
        return torch.equal(self.counts, other.counts) if isinstance(other, TaskTable) else NotImplemented

    __hash__ = None  # type: ignore[assignment]


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part.double() / whole) if int(whole) else math.nan


def task_scores(table: TaskTable, *, positive: str = "yes") -> dict[str, float]:
    """The task metrics of a table, NaN where undefined, without a warning.

    Accuracy is the share of `correct` over all answers. Precision, recall, F1 and yes ratio are over the yes/no
    questions, those whose gold answer is yes or no; a prediction that is neither counts as negative, and stays
    in the denominator of the yes ratio. The yes ratio is that of the predictions, whatever `positive` is.

    Args:
        table: the counts.
        positive: `yes` or `no`.

    Raises:
        ValueError: if `positive` is neither.
    """
    check_positive(positive)
    gold_positive = CLASSES.index(positive)
    by_class = table.counts.sum(-1)[:OTHER]
    hits = by_class[gold_positive, gold_positive]
    predicted, gold = by_class[:, gold_positive].sum(), by_class[gold_positive].sum()
    return {
        "accuracy": _ratio(table.counts[..., 1].sum(), table.counts.sum()),
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, gold),
        "f1": _ratio(2 * hits, predicted + gold),
        "yes_ratio": _ratio(by_class[:, 0].sum(), by_class.sum()),
    }
