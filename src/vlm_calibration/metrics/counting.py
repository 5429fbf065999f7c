"""The base of our torchmetrics: one int64 tensor of counts as the whole state, shared by a collection.

The state is O(1) in the number of predictions, is not touched by autocast or dtype casts, and is reduced across
processes by a single all-reduce sum, however many members a collection has.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from vlm_calibration.metrics.functional import to_device_of
from vlm_calibration.metrics.summary import check_category, warn_undefined_values
from vlm_calibration.metrics.table import ConfidenceTable, check_resolution, count_cells
from vlm_calibration.metrics.table_metrics import METRICS


def sum_across_processes(counts: Tensor, group: Any = None) -> list[Tensor]:
    """The sum of `counts` over all processes by one all-reduce, as the one-element list torchmetrics sums up."""
    total = counts.contiguous().clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]


class CountingMetric(Metric):
    """A metric whose whole state is one int64 tensor `counts`, the first dimension a row for each category.

    Row 0 counts the answers without a category; the overall value is over the sum of the rows.
    """

    is_differentiable = False
    full_state_update = False
    name: ClassVar[str]
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    counts: Tensor

    def __init__(self, shape: Sequence[int], categories: Iterable[str] | None, **kwargs: Any) -> None:
        """Add the state; see `CalibrationMetric` for the arguments."""
        kwargs.setdefault("dist_sync_fn", sum_across_processes)
        super().__init__(**kwargs)
        if isinstance(categories, str):
            raise ValueError(f"categories must be a list of names, got the string {categories!r}")
        self.categories: tuple[str, ...] | None = None if categories is None else tuple(categories)
        for category in self.categories or ():
            check_category(category)
        if len(set(self.categories or ())) != len(self.categories or ()):
            raise ValueError(f"categories must differ, got {list(self.categories or ())}")
        self._row_of = {name: row for row, name in enumerate(self.categories or (), start=1)}
        rows = 1 + len(self.categories or ())
        self.add_state("counts", torch.zeros(rows, *shape, dtype=torch.int64), dist_reduce_fx="sum")

    def rows(self, category: Sequence[str | None] | None, n: int) -> Tensor | None:
        """The row of each answer, or None if there is no breakdown.

        Raises:
            ValueError: on a category that was not declared, or another number of categories than answers.
        """
        if self.categories is None or category is None:
            return None
        if isinstance(category, str) or len(category) != n:
            raise ValueError(f"category must hold one name for each of the {n} answers, got {category!r}")
        unknown = {name for name in category if name is not None and name not in self._row_of}
        if unknown:
            raise ValueError(f"unknown categories {sorted(unknown)}; declared are {list(self.categories)}")
        row = [0 if name is None else self._row_of[name] for name in category]
        return torch.tensor(row, dtype=torch.int64, device=self.counts.device)

    def set_dtype(self, dst_type: str | torch.dtype) -> "CountingMetric":
        """Counts are integers whatever the dtype, so this changes nothing."""
        return self

    def by_category(self) -> dict[str, Tensor]:
        """Counts on the CPU: all answers under the empty suffix, then each category under `/category`."""
        counts = self.counts.cpu()
        parts = {"": counts.sum(0)}
        return parts | {f"/{name}": counts[row] for name, row in self._row_of.items()}

    def tables(self) -> dict[str, Any]:
        """The tables by suffix: all answers under the empty one, then `/category` ones; of this process alone."""
        raise NotImplementedError

    def evaluate(self, table: Any) -> Tensor:
        """The metric on one table, a float64 scalar, NaN where undefined, without a warning."""
        raise NotImplementedError

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The value, a float64 scalar on the metric's device; NaN where undefined, with one warning.

        Returns:
            a scalar without categories, else a dict with the keys `name` and `name/category`.
        """
        values = evaluate_all({self.name: self}, self.tables())
        return values[self.name] if self.categories is None else values

    def _plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot values as torchmetrics does, on a figure that pyplot does not keep."""
        if ax is not None:
            super()._plot(val, ax)
            return ax.figure, ax
        from vlm_calibration.metrics.figures import new_axes

        ax = new_axes()
        super()._plot(val, ax)
        return ax.figure, ax


def evaluate_all(members: Mapping[str, CountingMetric], tables: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every member on every table: first all names on all answers, then `name/category`; one warning for all NaN."""
    values = {
        name + suffix: member.evaluate(table)
        for suffix, table in tables.items()
        for name, member in members.items()
    }
    warn_undefined_values({name: float(value) for name, value in values.items()})
    moved = to_device_of(torch.stack(list(values.values())), next(iter(members.values())).counts)
    return dict(zip(values, moved.unbind(), strict=True))


class CalibrationMetric(CountingMetric):
    """Base of the calibration metrics: `name` picks the function and what `plot` draws.

    Args:
        categories: names to break the metric down by, fixed so that every process has the same state; None for
            no breakdown, in which case the categories of an update are not used.
        resolution: grid steps from 0 to 1; see `rounding_bounds` for what a coarser grid costs.
        n_bins: bins of binned metrics and of the reliability diagram.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: on a bad resolution, an empty or repeated category.
    """

    figure: ClassVar[str] = "confidence_histogram"
    binned: ClassVar[bool] = False

    def __init__(
        self, categories: Iterable[str] | None = None, resolution: int = 100, n_bins: int = 10, **kwargs: Any
    ) -> None:
        """See the class."""
        check_resolution(resolution)
        super().__init__((resolution + 2, 2), categories, **kwargs)
        self.resolution = resolution
        self.n_bins = n_bins

    def update(
        self, confidence: Tensor, correct: Tensor, category: Sequence[str | None] | None = None
    ) -> None:
        """Count N answers.

        Args:
            confidence: `(N,)` floating in [0, 1], NaN where it could not be parsed.
            correct: `(N,)` bool.
            category: N names (None for an answer without), if the metric has categories.

        Raises:
            ValueError: on a confidence outside [0, 1], a `correct` of another shape, an undeclared category.
        """
        row = self.rows(category, len(confidence))
        row = row if row is None else row.to(confidence.device)
        cells = count_cells(confidence, correct, self.resolution, row, len(self.counts))
        self.counts = self.counts + cells.to(self.counts.device)

    def tables(self) -> dict[str, ConfidenceTable]:
        """The tables by suffix: all answers under the empty one, then `/category` ones; of this process alone."""
        return {suffix: ConfidenceTable.from_cells(cells) for suffix, cells in self.by_category().items()}

    def evaluate(self, table: ConfidenceTable) -> Tensor:
        """The metric on one table, a float64 scalar, NaN where undefined, without a warning."""
        options = {"n_bins": self.n_bins} if self.binned else {}
        return METRICS[self.name](table, **options)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the metric.

        Args:
            val: results of `compute` or `forward` (one or several) to plot as values, as torchmetrics does;
                without it, the figure that shows what the metric measures is drawn from the table of this process.
            ax: matplotlib axes to draw into, or None for a new figure.

        Returns:
            the figure and its axes.
        """
        if val is not None:
            return self._plot(val, ax)
        from vlm_calibration.metrics import figures

        draw = getattr(figures, self.figure)
        options = {"n_bins": self.n_bins} if self.figure == "reliability_diagram" else {}
        drawn = draw(self.tables()[""], ax=ax, **options)
        return drawn, ax if ax is not None else drawn.axes[0]


class SharedStateCollection(MetricCollection):
    """A collection whose members share one state: one count for each update, one sum for each sync."""

    def __init__(
        self, members: Mapping[str, CountingMetric], prefix: str | None, postfix: str | None
    ) -> None:
        """Put all members into one compute group, known from the start, so that the first update is shared too."""
        super().__init__(dict(members), prefix=prefix, postfix=postfix, compute_groups=[list(members)])
        self._order = tuple(members)  # a MetricCollection sorts its members by name

    @property
    def leader(self) -> Any:
        """The member that is updated; the others refer to its state."""
        return self._modules[self._groups[0][0]]

    def tables(self, sync: bool = False) -> dict[str, Any]:
        """The tables behind the values by suffix: all answers under the empty one, then `/category` ones.

        Args:
            sync: sum over all processes, each of which must then call this; else those of this process alone.
        """
        leader = self.leader
        sync = sync and not leader._is_synced
        with leader.sync_context(dist_sync_fn=leader.dist_sync_fn, should_sync=sync, should_unsync=sync):
            return leader.tables()

    def _values(self, sync: bool) -> dict[str, Tensor]:
        members = {name: self._modules[name] for name in self._order}
        values = evaluate_all(members, self.tables(sync))  # type: ignore[arg-type]
        return {self._set_name(name): value for name, value in values.items()}

    def compute(self) -> dict[str, Tensor]:
        """All values by name over all processes, in the order of the members; one warning for all NaN."""
        return self._values(sync=self.leader.sync_on_compute)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Count a batch and return the values on that batch alone."""
        before = self.leader.counts
        self.leader.counts = torch.zeros_like(before)
        try:
            self.update(*args, **kwargs)
            values = self._values(sync=self.leader.dist_sync_on_step)
        finally:
            self.leader.counts = before + self.leader.counts
            self._state_is_copy = False
            self._compute_groups_create_state_ref()
        return values

    def set_dtype(self, dst_type: str | torch.dtype) -> "SharedStateCollection":
        """Counts are integers whatever the dtype, so this changes nothing."""
        return self

    def plot(self, val: Any = None, ax: Any = None, together: bool = False) -> Any:
        """Draw every member's figure, of this process alone, or the given values as `MetricCollection.plot` does.

        Returns:
            one `(figure, axes)` for each member, in order; a single one if `together`.
        """
        if val is not None or together:
            return super().plot(val, ax, together)
        members = list(self.values(copy_state=False))
        places = [None] * len(members) if ax is None else list(ax)
        return [member.plot(ax=place) for member, place in zip(members, places, strict=True)]
