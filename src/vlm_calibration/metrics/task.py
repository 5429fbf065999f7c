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
from vlm_calibration.metrics.table import as_correct_tensor

CLASSES = ("yes", "no")
OTHER = 2
TASK_SHAPE = (3, 3, 2)


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

    The classes are yes, no and other; case, outer spaces and a final period of yes and no do not matter.

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
    words = ((text or "").strip().rstrip(".").casefold() for texts in (answer, predicted) for text in texts)
    classes = [CLASSES.index(word) if word in CLASSES else OTHER for word in words]
    pairs = [
        gold * 3 + said for gold, said in zip(classes[: len(answer)], classes[len(answer) :], strict=True)
    ]
    cell = torch.tensor(pairs, dtype=torch.int64, device=correct.device) * 2 + correct
    if index is not None:
        cell = cell[index.to(cell.device)]
    if row is not None:
        cell = cell + row.to(cell.device) * math.prod(TASK_SHAPE)
    return torch.bincount(cell, minlength=rows * math.prod(TASK_SHAPE)).view(rows, *TASK_SHAPE)


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
        if tuple(self.counts.shape) != TASK_SHAPE or self.counts.dtype != torch.int64:
            raise ValueError(
                f"counts must be int64 of shape {TASK_SHAPE}, got {self.counts.dtype} {self.counts.shape}"
            )
        if int(self.counts.min()) < 0:
            raise ValueError("counts must not be negative")
        object.__setattr__(self, "counts", self.counts.detach().cpu().clone())

    @classmethod
    def from_predictions(
        cls, predicted: Sequence[str | None], answer: Sequence[str], correct: Tensor | Sequence[bool]
    ) -> "TaskTable":
        """Count N answers; see `count_answers`."""
        return cls(count_answers(predicted, answer, as_correct_tensor(correct))[0])


TASK_METRICS: dict[str, MetricSpec] = {
    name: MetricSpec(name=name, heading=heading, undefined=undefined, higher_is_better=higher_is_better)
    for name, heading, undefined, higher_is_better in (
        ("accuracy", "accuracy", "there is no answer", True),
        ("precision", "precision", "the positive class was never predicted on a yes/no question", True),
        ("recall", "recall", "the positive class is the gold answer of no question", True),
        ("f1", "F1", "the positive class was neither predicted nor a gold answer", True),
        ("yes_ratio", "yes ratio", "there is no yes/no question", None),
    )
}
"""The declarations of the task metrics by flat name."""


def task_scores(table: TaskTable, *, positive: str = "yes") -> dict[str, float]:
    """The task metrics of a table by flat name, NaN where undefined, without a warning; ValueError unless `positive` is yes or no."""
    check_positive(positive)
    k = CLASSES.index(positive)
    # Answers to yes/no questions by gold class (yes, no) and predicted class (yes, no, other).
    yes_no = table.counts.sum(-1)[:OTHER]
    hits, predicted, gold = yes_no[k, k], yes_no[:, k].sum(), yes_no[k].sum()
    ratios = {
        "accuracy": (table.counts[..., 1].sum(), table.counts.sum()),
        "precision": (hits, predicted),
        "recall": (hits, gold),
        "f1": (2 * hits, predicted + gold),
        "yes_ratio": (yes_no[:, 0].sum(), yes_no.sum()),
    }
    return {name: float(part.double() / n) if int(n) else math.nan for name, (part, n) in ratios.items()}
