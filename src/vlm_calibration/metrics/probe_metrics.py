"""The numbers about probed confidences as a torchmetric."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from vlm_calibration.metrics.probes import Probed, count_probes, probe_values


class ProbeMetrics(Metric):
    """The metrics of `probe_values` over all answers, and as `NAME/CATEGORY` over each category.

    The state is a table of whole numbers, so processes and batches of any size give the same bits.

    Args:
        probes: names of the probes; none: there are no metrics.
        categories: names to break down by.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, probes: Sequence[str] = (), categories: Sequence[str] = ()) -> None:
        super().__init__()
        self.probes = tuple(probes)
        self.suffixes = ["", *(f"/{category}" for category in categories)]
        self._row = {category: row for row, category in enumerate(categories, start=1)}
        empty = torch.zeros(len(self.suffixes), len(self.probes), 5, dtype=torch.int64)
        self.add_state("counts", empty, dist_reduce_fx="sum")

    def update(self, probed: Sequence[Probed], categories: Sequence[Sequence[str]]) -> None:
        """Count N answers.

        Args:
            probed: the confidences of each answer, those of all probes.
            categories: for each answer the categories that it belongs to.
        """
        rows = [[0, *(self._row[c] for c in of_answer)] for of_answer in categories]
        counts = count_probes(probed, self.probes, rows, len(self.suffixes))
        self.counts = self.counts + counts.to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """Each metric, float64, NaN where undefined."""
        values: dict[str, float] = {}
        for counts, suffix in zip(self.counts, self.suffixes, strict=True):
            values |= probe_values(counts, self.probes, suffix)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
