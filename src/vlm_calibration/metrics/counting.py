"""The base of the torchmetrics classes: one int64 tensor of counts as the whole state, shared by a collection.

The state is O(1) in the number of predictions, is not changed by autocast or dtype casts, and is reduced across
processes by a single all-reduce sum, however many members a collection has.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from vlm_calibration.metrics.functional import to_device_of
from vlm_calibration.metrics.groups import MetricSpec, check_correct
from vlm_calibration.metrics.summary import check_category, warn_undefined_values
from vlm_calibration.metrics.table import ConfidenceTable, check_grid_steps, count_cells

Category = str | Collection[str] | None
"""The category of an answer, several of them, or none."""
M = TypeVar("M", bound="CountingMetric")


def sum_across_processes(counts: Tensor, group: Any = None) -> list[Tensor]:
    """The sum of `counts` over all processes by one all-reduce, as the one-element list that torchmetrics sums up."""
    total = counts.contiguous().clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]


class CountingMetric(Metric):
    """A metric whose whole state is one int64 tensor `counts`.

    Row 0 counts all answers, each further row those of one category; an answer may be in several categories.
    """

    is_differentiable = False
    full_state_update = False
    spec: ClassVar[MetricSpec]
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

    def rows(self, category: Sequence[Category] | None, n: int) -> tuple[Tensor | None, Tensor | None]:
        """Which of N answers to count in which rows, int64 [M] each; None and None for every answer in row 0.

        Raises:
            ValueError: on a category that was not declared, or another number of categories than answers.
        """
        if not self.categories or category is None:
            return None, None
        if isinstance(category, str) or len(category) != n:
            raise ValueError(f"category must hold one name for each of the {n} answers, got {category!r}")
        names = [(name,) if isinstance(name, str) else name or () for name in category]
        unknown = {name for of_answer in names for name in of_answer if name not in self._row_of}
        if unknown:
            raise ValueError(f"unknown categories {sorted(unknown)}; declared are {list(self.categories)}")
        # All answers come first, so that an error in one names its index.
        index = [*range(n), *(i for i, of_answer in enumerate(names) for _ in of_answer)]
        row = [0] * n + [self._row_of[name] for of_answer in names for name in of_answer]
        return torch.tensor(index, dtype=torch.int64), torch.tensor(row, dtype=torch.int64)

    def set_dtype(self, dst_type: str | torch.dtype) -> "CountingMetric":
        """Do nothing: counts are integers whatever the dtype."""
        return self

    def by_category(self) -> dict[str, Tensor]:
        """Counts on the CPU by suffix: all answers under the empty one, then `/category`."""
        counts = self.counts.cpu()
        return {"": counts[0], **{f"/{name}": counts[row] for name, row in self._row_of.items()}}

    def tables(self) -> dict[str, Any]:
        """The tables of this process by suffix: all answers under the empty one, then `/category`."""
        raise NotImplementedError

    def evaluate(self, table: Any) -> Tensor:
        """The metric on one table, a float64 scalar, NaN where undefined, without a warning."""
        raise NotImplementedError

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The value, a float64 scalar on the metric's device; NaN where undefined, with one warning.

        Returns:
            a scalar without categories, else a dict with the keys `name` and `name/category`.
        """
        values = evaluate_all({self.spec.name: self}, self.tables())
        return values[self.spec.name] if self.categories is None else values

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values, by default the current one, as torchmetrics does; returns the figure and its axes."""
        return self._plot(val, ax)


def class_of(spec: MetricSpec, base: type[M], module: str) -> type[M]:
    """The torchmetrics class of a declared metric, a subclass of `base` that pickles as a member of `module`."""
    members = {
        "__doc__": f"{spec.summary}\n\n{spec.range} Arguments are those of `{base.__name__}`.",
        "__module__": module,
        "spec": spec,
        "higher_is_better": spec.higher_is_better,
        "plot_lower_bound": spec.lower,
        "plot_upper_bound": None if spec.upper == float("inf") else spec.upper,
    }
    return type(spec.class_name, (base,), members)


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
    """Base class of the calibration metrics.

    Args:
        categories: names to break the metric down by, fixed so that every process has the same state; None for
            no breakdown, in which case the categories of an update are not used.
        grid_steps: grid steps from 0 to 1.
        n_bins: bins of binned metrics and of the reliability diagram.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: on bad grid steps, an empty or repeated category.
    """

    def __init__(
        self, categories: Iterable[str] | None = None, grid_steps: int = 100, n_bins: int = 10, **kwargs: Any
    ) -> None:
        """See the class."""
        check_grid_steps(grid_steps)
        super().__init__((grid_steps + 2, 2), categories, **kwargs)
        self.grid_steps = grid_steps
        self.n_bins = n_bins

    def update(self, confidence: Tensor, correct: Tensor, category: Sequence[Category] | None = None) -> None:
        """Count N answers.

        Args:
            confidence: float [N] in [0, 1], NaN where it could not be parsed.
            correct: bool [N].
            category: N names, collections of names or None, if the metric has categories.

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

    def tables(self) -> dict[str, ConfidenceTable]:
        """The tables of this process by suffix: all answers under the empty one, then `/category`."""
        return {suffix: ConfidenceTable.from_cells(cells) for suffix, cells in self.by_category().items()}

    def evaluate(self, table: ConfidenceTable) -> Tensor:
        """The metric on one table, a float64 scalar, NaN where undefined, without a warning."""
        return self.spec(table, **({"n_bins": self.n_bins} if self.spec.is_binned else {}))


class SharedStateCollection(MetricCollection):
    """A collection whose members share one state: one count for each update, one sum for each sync."""

    def __init__(
        self, members: Mapping[str, CountingMetric], prefix: str | None, postfix: str | None
    ) -> None:
        """Put all members into one compute group from the start, so that the first update is shared too."""
        super().__init__(dict(members), prefix=prefix, postfix=postfix, compute_groups=[list(members)])
        self._order = tuple(members)  # a MetricCollection sorts its members by name

    @property
    def leader(self) -> Any:
        """The member that is updated; the others refer to its state."""
        return self._modules[self._groups[0][0]]

    def tables(self, sync: bool = False) -> dict[str, Any]:
        """The tables behind the values by suffix: all answers under the empty one, then `/category`.

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
        """Do nothing: counts are integers whatever the dtype."""
        return self
