"""The loader of perturbed queries: batches for the model, and a log of the records that could not be loaded.

Records are loaded in worker processes, where nobody counts. So what is wrong with some of a batch travels with the batch, is
taken off it in the process that trains or evaluates, and is summed over all processes at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from vlm_calibration.data.dataset import Drawn, PerturbedQueries
from vlm_calibration.data.noise import Sample
from vlm_calibration.data.sources.base import MAX_NAMED, first_of
from vlm_calibration.records import DataError


class LoadingLog:
    """What was found out about the records of a data set in loading them, in this process.

    Attributes:
        left_out, clipped: int32 [N], 1 where a record could not be loaded, and where a region of it leaves its image.
    """

    def __init__(self, dataset: PerturbedQueries) -> None:
        self.dataset = dataset
        self.left_out = torch.zeros(len(dataset), dtype=torch.int32)
        self.clipped = torch.zeros_like(self.left_out)

    def add(self, drawn: Drawn) -> None:
        """Note what is wrong with records of a batch; the first few that are left out are named at once."""
        for place, message in drawn.left_out.items():
            if not self.left_out[place] and int(self.left_out.sum()) < MAX_NAMED:
                warnings.warn(f"{self.dataset.where}: left out: {message}", stacklevel=2)
            self.left_out[place] = 1
        self.clipped[drawn.clipped] = 1

    def report(self, trainer: L.Trainer) -> None:
        """Say what all processes together have found, and forget it; every process must call this.

        Raises:
            DataError: no record could be loaded.
        """
        strategy = trainer.strategy
        found = torch.stack([self.left_out, self.clipped]).to(strategy.root_device)
        left_out, clipped = torch.as_tensor(strategy.reduce(found, reduce_op="sum")).cpu() > 0
        self.left_out.zero_()
        self.clipped.zero_()
        where, total = self.dataset.where, len(self.dataset)
        if bool(left_out.all()):
            raise DataError(
                f"{where}: none of its {total} records could be loaded; some of them are named above"
            )
        for places, what in (
            (left_out, "could not be loaded and were left out"),
            (clipped, "have a region that leaves the image, of which only what lies within was used"),
        ):
            if count := int(places.sum()):
                first = places.nonzero().flatten()[: MAX_NAMED + 1].tolist()
                ids = first_of([self.dataset.queries[place].id for place in first])
                rank_zero_warn(f"{where}: {count} of {total} queries {what}: {ids}")


class QueryLoader(DataLoader):
    """A `DataLoader` of perturbed queries that notes in a log which records it leaves out.

    Args:
        log: of the data set to load from.
        collate_fn: makes a batch of the samples of those records that can be loaded, of none as well.
        settings: of `DataLoader`.
    """

    def __init__(
        self, log: LoadingLog, collate_fn: Callable[[Sequence[Sample]], Any], **settings: Any
    ) -> None:
        super().__init__(log.dataset, collate_fn=_Collator(collate_fn), **settings)  # type: ignore[arg-type]
        self.log = log

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Not a generator: workers begin now, not when the first batch is asked for.
        return map(self._noted, super().__iter__())

    def _noted(self, collated: tuple[Any, Drawn]) -> Any:
        batch, drawn = collated
        self.log.add(drawn)
        return batch


class _Collator:
    """Makes a batch of what was drawn, and keeps beside it what was left out."""

    def __init__(self, collate: Callable[[Sequence[Sample]], Any]) -> None:
        self.collate = collate

    def __call__(self, drawn: Drawn) -> tuple[Any, Drawn]:
        return self.collate(drawn.samples), drawn._replace(samples=[])
