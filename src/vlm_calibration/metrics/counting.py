"""The metrics as torchmetrics, each kind with one int64 tensor of counts as its whole state.

The state is O(1) in the number of predictions, is not changed by autocast or `half()`, and is reduced by one all-reduce sum.
"""

import math
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from vlm_calibration.metrics.functional import REPORTED, UndefinedMetricWarning, table_values, to_device_of
from vlm_calibration.metrics.probes import Probed, count_probes, probe_values
from vlm_calibration.metrics.table import ConfidenceTable, check_predictions, to_level
from vlm_calibration.metrics.task import ALL_METRICS, TASK_SHAPE, answer_cells, task_scores

Categories = Sequence[Collection[str]]
"""The categories of each answer; an answer may be in several, or in none."""


def sum_across_processes(counts: Tensor, group: Any = None) -> list[Tensor]:
    """The sum of `counts` over all processes by one all-reduce, as the one-element list that torchmetrics sums up."""
    total = counts.contiguous().clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]


class CountingMetric(Metric):
    """Metrics whose whole state is one int64 tensor `counts`: row 0 of all answers, each further row of one category.

    Args:
        shape: of the counts of one row.
        categories: different names to break the metrics down by; None: the categories of an update are not used.
    """

    is_differentiable = False
    full_state_update = False
    update_called = True  # Torchmetrics need not warn of metrics without answers
    counts: Tensor

    def __init__(self, shape: Sequence[int], categories: Iterable[str] | None) -> None:
        # With the cache, a process without new answers would return its last value and leave the others waiting for its counts.
        super().__init__(dist_sync_fn=sum_across_processes, compute_with_cache=False)
        self.categories = tuple(categories or ())
        names = {*self.categories}
        if isinstance(categories, str) or "" in names or len(names) < len(self.categories):
            raise ValueError(f"categories must be different names, not empty, got {categories!r}")
        rows = torch.zeros(1 + len(self.categories), *shape, dtype=torch.int64)
        self.add_state("counts", rows, dist_reduce_fx="sum")

    def count(self, cell: Tensor, categories: Categories | None) -> None:
        """Count N answers in row 0 and the rows of their categories; `cell`, int64 [N], is the place of each in the flattened counts of a row.

        KeyError on a category that was not declared, ValueError on another number of categories than answers.
        """
        if self.categories and categories is not None:
            row_of = {name: row for row, name in enumerate(self.categories, start=1)}
            of_answers = zip(range(len(cell)), categories, strict=True)
            pairs = [(i, row_of[name]) for i, of_answer in of_answers for name in of_answer]
            index, row = torch.tensor(pairs, dtype=torch.int64, device=cell.device).view(-1, 2).T
            cell = torch.cat([cell, cell[index] + row * self.counts[0].numel()])
        counts = torch.bincount(cell, minlength=self.counts.numel()).view_as(self.counts)
        self.counts = self.counts + counts.to(self.counts.device)

    def values(self, counts: Tensor, suffix: str) -> dict[str, float]:
        """The metrics of the counts of one row on the CPU, NaN where undefined; `suffix` is behind their names."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        """All metrics by name, then by `name/category`, float64 on the metric's device; one warning names all that are NaN, and why."""
        values: dict[str, float] = {}
        for name, counts in zip(("", *self.categories), self.counts.cpu(), strict=True):
            values |= self.values(counts, f"/{name}" if name else "")
        undefined: dict[str, list[str]] = {}
        for name, value in values.items():
            if (spec := ALL_METRICS.get(name.split("/", 1)[0])) is not None and math.isnan(value):
                undefined.setdefault(spec.undefined, []).append(name)
        if undefined:
            message = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in undefined.items())
            warnings.warn(f"undefined (NaN): {message}", UndefinedMetricWarning, stacklevel=2)
        moved = to_device_of(torch.tensor(list(values.values()), dtype=torch.float64), self.counts)
        return dict(zip(values, moved.unbind(), strict=True))


class CalibrationCounts(CountingMetric):
    """The member of `CalibrationMetrics`, with its arguments."""

    def __init__(self, categories: Iterable[str] | None, grid_steps: int, metrics: Iterable[str]) -> None:
        super().__init__((grid_steps + 2, 2), categories)
        self.grid_steps, self.names = grid_steps, tuple(metrics)

    def update(self, confidence: Tensor, correct: Tensor, category: Categories | None = None) -> None:
        """Count N answers, with the categories of each if there are any; see `check_predictions`."""
        check_predictions(confidence, correct)
        level = to_level(confidence.detach(), self.grid_steps)
        self.count(level * 2 + correct.to(level.device), category)

    def values(self, counts: Tensor, suffix: str) -> dict[str, float]:
        level = counts[:-1].sum(1).nonzero()[:, 0]  # the last row is of unparsed answers
        table = ConfidenceTable(level.double() / self.grid_steps, counts[level], counts[-1].sum())
        return table_values(table, self.names, suffix)


class CalibrationMetrics(MetricCollection):
    """All calibration metrics over one table; keys are those of `metrics.json`.

    `compute()` returns each metric, float64, and each again with a `/category` suffix for every category. `n` counts all answers; the
    other metrics are over the answers whose confidence could be read.

    Args:
        categories: names to break down by; None for no breakdown.
        grid_steps: grid steps from 0 to 1.
        metrics: names from `METRICS`, by default those of `metrics.json`.
        kwargs: those of `torchmetrics.MetricCollection`, such as `prefix`.

    Example:
        >>> metrics = CalibrationMetrics(prefix="val/", metrics=("n", "ece", "brier"))
        >>> metrics.update(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        >>> {name: round(float(value), 3) for name, value in metrics.compute().items()}
        {'val/n': 3.0, 'val/ece': 0.367, 'val/brier': 0.303}
    """

    def __init__(
        self,
        *,
        categories: Iterable[str] | None = None,
        grid_steps: int = 100,
        metrics: Iterable[str] = REPORTED,
        **kwargs: Any,
    ) -> None:
        super().__init__(CalibrationCounts(categories, grid_steps, metrics), **kwargs)


class TaskMetrics(CountingMetric):
    """Accuracy over all answers; precision, recall, F1 and yes ratio over the yes/no questions; see `CountingMetric`."""

    def __init__(self, categories: Iterable[str] | None = None) -> None:
        super().__init__(TASK_SHAPE, categories)

    def update(
        self,
        predicted: Sequence[str | None],
        answer: Sequence[str],
        correct: Tensor,
        category: Categories | None = None,
    ) -> None:
        """Count N answers, with the categories of each if there are any; see `answer_cells`."""
        self.count(answer_cells(predicted, answer, correct), category)

    def values(self, counts: Tensor, suffix: str) -> dict[str, float]:
        return task_scores(counts, suffix)


class ProbeMetrics(CountingMetric):
    """The metrics of `probe_values` for probes by name, over all answers and each category."""

    def __init__(self, probes: Sequence[str] = (), categories: Sequence[str] = ()) -> None:
        super().__init__((len(probes), 5), categories)
        self.probes = tuple(probes)

    def update(self, probed: Sequence[Probed], categories: Categories) -> None:
        """Count N answers: the confidences of all probes, and the categories, of each."""
        members = [probed]
        members += [[p for p, of in zip(probed, categories, strict=True) if c in of] for c in self.categories]
        counts = torch.stack([count_probes(part, self.probes) for part in members])
        self.counts = self.counts + counts.to(self.counts.device)

    def values(self, counts: Tensor, suffix: str) -> dict[str, float]:
        return probe_values(counts, self.probes, suffix)
