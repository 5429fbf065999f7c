"""Task metrics beside the calibration metrics: accuracy over all answers, and yes/no metrics of which yes is the positive class.

Each is a function of counts, int64 [3, 3, 2]: (gold, predicted, correct) with gold and predicted one of yes, no, other. Precision,
recall, F1 and yes ratio are over the yes/no questions, whose gold answer is yes or no. A prediction that is neither
counts as negative, and stays in the denominator of the yes ratio.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_calibration.metrics.functional import METRICS, MetricSpec

CLASSES = ("yes", "no")
YES, OTHER = 0, 2
TASK_SHAPE = (3, 3, 2)


def answer_cells(predicted: Sequence[str | None], answer: Sequence[str], correct: Tensor) -> Tensor:
    """The cell of the flattened counts that each of N answers is in, int64 [N] on the device of `correct`.

    `predicted` has parsed answers, None where none could be parsed, and `answer` the gold ones; case, outer spaces and a final period of
    yes and no do not matter. ValueError if the lengths differ.
    """
    if not len(predicted) == len(answer) == len(correct):
        raise ValueError(f"got {len(predicted)} predicted, {len(answer)} answers and {len(correct)} correct")
    classes = (list(map(_class_of, texts)) for texts in (answer, predicted))
    gold, said = (torch.tensor(c, dtype=torch.int64, device=correct.device) for c in classes)
    return (gold * 3 + said) * 2 + correct


def _class_of(text: str | None) -> int:
    word = (text or "").strip().rstrip(".").casefold()
    return CLASSES.index(word) if word in CLASSES else OTHER


def count_answers(predicted: Sequence[str | None], answer: Sequence[str], correct: Sequence[bool]) -> Tensor:
    """The counts of N answers, int64 [3, 3, 2]; see `answer_cells`."""
    cells = answer_cells(predicted, answer, torch.tensor(list(correct), dtype=torch.bool))
    return torch.bincount(cells, minlength=math.prod(TASK_SHAPE)).view(TASK_SHAPE)


TASK_METRICS = {
    name: MetricSpec(heading=heading, undefined=undefined, higher_is_better=better)
    for name, heading, undefined, better in (
        ("accuracy", "accuracy", "there is no answer", True),
        ("precision", "precision", "yes was never predicted on a yes/no question", True),
        ("recall", "recall", "yes is the gold answer of no question", True),
        ("f1", "F1", "yes was neither predicted nor a gold answer", True),
        ("yes_ratio", "yes ratio", "there is no yes/no question", None),
    )
}
ALL_METRICS: dict[str, MetricSpec] = {**TASK_METRICS, **METRICS}
"""The declarations of task and calibration metrics by flat name."""


def task_scores(counts: Tensor, suffix: str = "") -> dict[str, float]:
    """The task metrics of counts by flat name, NaN where undefined, without a warning."""
    yes_no = counts.sum(-1)[:OTHER].double()
    hits, answered, gold = yes_no[YES, YES], yes_no[:, YES].sum(), yes_no[YES].sum()
    accuracy = counts[..., 1].sum().double() / counts.sum()
    scores = {"accuracy": accuracy, "precision": hits / answered, "recall": hits / gold}
    scores |= {"f1": 2 * hits / (answered + gold), "yes_ratio": answered / yes_no.sum()}
    return {name + suffix: float(value) for name, value in scores.items()}
