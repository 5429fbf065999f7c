"""The metrics as torchmetrics, each kind with one int64 tensor of counts as its whole state.

The state is O(1) in the number of predictions, is not changed by autocast or dtype casts, and is reduced across
processes by a single all-reduce sum, however many metrics are computed from it.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from vlm_calibration.metrics.functional import REPORTED, to_device_of
from vlm_calibration.metrics.groups import check_correct
from vlm_calibration.metrics.probes import Probed, count_probes, probe_values
from vlm_calibration.metrics.summary import (
    check_category,
    check_names,
    table_values,
    warn_undefined_values,
)
from vlm_calibration.metrics.table import ConfidenceTable, check_grid_steps, count_cells
from vlm_calibration.metrics.task import TASK_SHAPE, TaskTable, check_positive, count_answers, task_scores

Category = str | Collection[str] | None
"""The category of an answer, several of them, or none."""


def sum_across_processes(counts: Tensor, group: Any = None) -> list[Tensor]:
    """The sum of `counts` over all processes by one all-reduce, as the one-element list that torchmetrics sums up."""
    total = counts.contiguous().clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]


class CountingMetric(Metric):
    """Metrics whose whole state is one int64 tensor `counts`.

    Row 0 counts all answers, each further row those of one category; an answer may be in several categories.

    Args:
        shape: of the counts of one row.
        categories: names to break the metrics down by, fixed so that every process has the same state; None for
            no breakdown, in which case the categories of an update are not used.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: on an empty or repeated category.
    """

    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self, shape: Sequence[int], categories: Iterable[str] | None, **kwargs: Any) -> None:
        kwargs.setdefault("dist_sync_fn", sum_across_processes)
        # A process without new answers would else return its last value and leave the others waiting for its counts.
        kwargs.setdefault("compute_with_cache", False)
        super().__init__(**kwargs)
        if isinstance(categories, str):
            raise ValueError(f"categories must be a list of names, got the string {categories!r}")
        names = tuple(categories or ())
        for category in names:
            check_category(category)
        self._row_of = {name: row for row, name in enumerate(names, start=1)}
        if len(self._row_of) != len(names):
            raise ValueError(f"categories must differ, got {list(names)}")
        self.suffixes = ("", *(f"/{name}" for name in names))
        self.add_state("counts", torch.zeros(1 + len(names), *shape, dtype=torch.int64), dist_reduce_fx="sum")

    def rows(self, category: Sequence[Category] | None, n: int) -> tuple[Tensor | None, Tensor | None]:
        """Which of N answers to count in which rows, int64 [M] each; None and None for every answer in row 0.

        Raises:
            ValueError: on a category that was not declared, or another number of categories than answers.
        """
        if not self._row_of or category is None:
            return None, None
        if isinstance(category, str) or len(category) != n:
            raise ValueError(f"category must hold one name for each of the {n} answers, got {category!r}")
        names = [(name,) if isinstance(name, str) else name or () for name in category]
        unknown = {name for of_answer in names for name in of_answer if name not in self._row_of}
        if unknown:
            raise ValueError(f"unknown categories {sorted(unknown)}; declared are {list(self._row_of)}")
        # All answers come first, so that an error in one names its index.
        index = [*range(n), *(i for i, of_answer in enumerate(names) for _ in of_answer)]
        row = [0] * n + [self._row_of[name] for of_answer in names for name in of_answer]
        return torch.tensor(index, dtype=torch.int64), torch.tensor(row, dtype=torch.int64)

    @property
    def update_called(self) -> bool:
        """True: no answers are a state like any other, and no reason for a warning of torchmetrics."""
        return True

    def set_dtype(self, dst_type: str | torch.dtype) -> "CountingMetric":
        """Do nothing: counts are integers whatever the dtype."""
        return self

    def values(self, counts: Tensor, suffix: str) -> dict[str, float]:
        """The metrics of the counts of one row on the CPU, NaN where undefined, with `suffix` behind their names."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        """All metrics by name, then by `name/category`, float64 on the metric's device; one warning for all that are NaN."""
        values: dict[str, float] = {}
        for suffix, counts in zip(self.suffixes, self.counts.cpu(), strict=True):
            values |= self.values(counts, suffix)
        warn_undefined_values(values)
        moved = to_device_of(torch.tensor(list(values.values()), dtype=torch.float64), self.counts)
        return dict(zip(values, moved.unbind(), strict=True))


class CalibrationCounts(CountingMetric):
    """The member of `CalibrationMetrics`, with its arguments."""

    def __init__(
        self, categories: Iterable[str] | None, grid_steps: int, metrics: Iterable[str], **kwargs: Any
    ) -> None:
        check_grid_steps(grid_steps)
        super().__init__((grid_steps + 2, 2), categories, **kwargs)
        self.grid_steps = grid_steps
        self.names = check_names(metrics)

    def update(self, confidence: Tensor, correct: Tensor, category: Sequence[Category] | None = None) -> None:
        """Count N answers.

        Args:
            confidence: float [N] in [0, 1], NaN where it could not be parsed.
            correct: bool [N].
            category: N names, collections of names or None, if there are categories.

        Raises:
            ValueError: on a confidence outside [0, 1], a `correct` of another shape, an undeclared category.
        """
        correct = check_correct(correct, confidence.shape)
        index, row = self.rows(category, len(confidence))
        if index is not None and row is not None:
            confidence, correct = confidence[index.to(confidence.device)], correct[index.to(correct.device)]
            row = row.to(confidence.device)
        cells = count_cells(confidence, correct, self.grid_steps, row, len(self.counts))
        self.counts = self.counts + cells.to(self.counts.device)

    def values(self, counts: Tensor, suffix: str) -> dict[str, float]:
        return table_values(ConfidenceTable.from_cells(counts), self.names, suffix)


class CalibrationMetrics(MetricCollection):
    """All calibration metrics over one table; keys are those of `metrics.json`.

    `compute()` returns `n, ece, ace, mce, brier, brier_reliability, brier_resolution, brier_uncertainty, log_loss,
    auroc, aurc, smooth_ece, mean_confidence, overconfidence, parse_failure_rate`, float64, each again with a
    `/category` suffix for every category. `n` counts all answers; the other metrics are over the answers whose confidence
    could be read.

    Args:
        prefix: put before every key.
        postfix: put after every key, category included.
        categories: names to break down by; None for no breakdown.
        grid_steps: grid steps from 0 to 1.
        metrics: names from `METRICS`, by default those above.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: on an unknown metric, bad grid steps, an empty or repeated category.

    Example:
        >>> metrics = CalibrationMetrics(prefix="val/", metrics=("n", "ece", "brier"))
        >>> metrics.update(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        >>> {name: round(float(value), 3) for name, value in metrics.compute().items()}
        {'val/n': 3.0, 'val/ece': 0.367, 'val/brier': 0.303}
    """

    def __init__(
        self,
        prefix: str | None = None,
        postfix: str | None = None,
        categories: Iterable[str] | None = None,
        grid_steps: int = 100,
        metrics: Iterable[str] = REPORTED,
        **kwargs: Any,
    ) -> None:
        counts = CalibrationCounts(categories, grid_steps, metrics, **kwargs)
        super().__init__(counts, prefix=prefix, postfix=postfix)


class TaskCounts(CountingMetric):
    """The member of `TaskMetrics`, with its arguments."""

    def __init__(self, positive: str, categories: Iterable[str] | None, **kwargs: Any) -> None:
        check_positive(positive)
        super().__init__(TASK_SHAPE, categories, **kwargs)
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
            category: as for `CalibrationCounts.update`.

        Raises:
            ValueError: if the lengths differ, `correct` is not bool, or a category was not declared.
        """
        correct = check_correct(correct, torch.Size([len(answer)]))
        cells = count_answers(predicted, answer, correct, *self.rows(category, len(answer)), len(self.counts))
        self.counts = self.counts + cells.to(self.counts.device)

    def values(self, counts: Tensor, suffix: str) -> dict[str, float]:
        scores = task_scores(TaskTable(counts), positive=self.positive)
        return {name + suffix: score for name, score in scores.items()}


class TaskMetrics(MetricCollection):
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
        super().__init__(TaskCounts(positive, categories, **kwargs), prefix=prefix, postfix=postfix)


class ProbeMetrics(CountingMetric):
    """The metrics of `probe_values` over all answers, and as `NAME/CATEGORY` over each category.

    Args:
        probes: names of the probes; none: there are no metrics.
        categories: names to break down by.
    """

    def __init__(self, probes: Sequence[str] = (), categories: Sequence[str] = ()) -> None:
        super().__init__((len(probes), 5), categories)
        self.probes = tuple(probes)

    def update(self, probed: Sequence[Probed], categories: Sequence[Sequence[str]]) -> None:
        """Count N answers: the confidences of all probes, and the categories, of each."""
        rows = [[0, *(self._row_of[c] for c in of_answer)] for of_answer in categories]
        counts = count_probes(probed, self.probes, rows, len(self.suffixes))
        self.counts = self.counts + counts.to(self.counts.device)

    def values(self, counts: Tensor, suffix: str) -> dict[str, float]:
        return probe_values(counts, self.probes, suffix)
