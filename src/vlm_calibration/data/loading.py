"""Loading batches: their order, a pure function of (seed, epoch, number of processes), and a log of the records that could not be loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler

from vlm_calibration.data.dataset import PerturbedQueries, SampleBatch
from vlm_calibration.data.noise import Sample
from vlm_calibration.files import MAX_NAMED, name_some
from vlm_calibration.records import DataError

PROBLEMS = (
    "could not be loaded and were left out",
    "have a region that leaves the image, of which only the part inside was used",
    "have a region without a pixel, so their images stayed untouched",
)


class EpochSampler(DistributedSampler):
    """Distributes `size` samples over processes and yields (epoch, index).

    In training the order is new each epoch, and every process gets the same number of samples, since one with fewer would block the
    others; the rest is left out. Otherwise each sample goes to exactly one process, in order and as of epoch 0. Indices in `done` are
    skipped, which changes nothing for the others. As a `DistributedSampler` it is not replaced by Lightning, which sets its epoch.
    """

    def __init__(
        self, size: int, rank: int, num_replicas: int, training: bool, seed: int = 0, done: Iterable[int] = ()
    ) -> None:
        # The base class uses the dataset only for its length.
        super().__init__(range(size), num_replicas, rank, training, seed)  # type: ignore[arg-type]
        self.length, self.training, self.done = size, training, list(done)
        self.begin = (0, 0)
        """An epoch, and how many of its samples of this process to skip; other epochs are complete."""

    def indices(self) -> np.ndarray:
        """Indices of this process's samples in the current epoch, in order."""
        order = np.arange(self.length)
        if self.training:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
            order = order[: self.length // self.num_replicas * self.num_replicas]
        own = order[self.rank :: self.num_replicas]
        return own[~np.isin(own, self.done)]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch if self.training else 0
        skipped = self.begin[1] if epoch == self.begin[0] else 0
        return iter([(epoch, int(i)) for i in self.indices()[skipped:]])

    def __len__(self) -> int:
        """Number of samples of a complete epoch."""
        return len(self.indices())


class LoadingLog:
    """Which records of a dataset had which of `PROBLEMS` in this process: int32 [3, N] of 0 and 1."""

    def __init__(self, dataset: PerturbedQueries) -> None:
        self.dataset = dataset
        self.problems = torch.zeros((len(PROBLEMS), len(dataset)), dtype=torch.int32)

    def add(self, batch: SampleBatch) -> None:
        """Record the problems of a batch, and warn at once about the first few records that are left out."""
        left_out, clipped, empty = self.problems
        for index, message in batch.left_out.items():
            if not left_out[index] and int(left_out.sum()) < MAX_NAMED:
                warnings.warn(f"{self.dataset.where}: left out: {message}", stacklevel=2)
            left_out[index] = 1
        clipped[batch.clipped] = 1
        empty[batch.empty] = 1

    def report(self, trainer: L.Trainer) -> None:
        """Every process reports the problems of all and resets the log; a DataError if no record could be loaded."""
        strategy = trainer.strategy
        reduced = strategy.reduce(self.problems.to(strategy.root_device), reduce_op="sum")
        problems = torch.as_tensor(reduced).cpu() > 0
        self.problems.zero_()
        where, total = self.dataset.where, len(self.dataset)
        if problems[0].all():
            problem = f"none of its {total} records could be loaded; some of them are named above"
            raise DataError(f"{where}: {problem}")
        for mask, problem in zip(problems, PROBLEMS, strict=True):
            if count := int(mask.sum()):
                first = mask.nonzero().flatten()[:MAX_NAMED].tolist()
                ids = name_some((self.dataset.queries[index].id for index in first), count)
                rank_zero_warn(f"{where}: {count} of {total} queries {problem}: {ids}")


class QueryLoader(DataLoader):
    """A `DataLoader` of perturbed queries that logs the records that are left out; `collate` makes a batch of samples, possibly none."""

    def __init__(self, log: LoadingLog, collate: Callable[[Sequence[Sample]], Any], **settings: Any) -> None:
        super().__init__(log.dataset, collate_fn=partial(_with_problems, collate), **settings)
        self.log = log

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        def logged(collated: tuple[Any, SampleBatch]) -> Any:
            self.log.add(collated[1])
            return collated[0]

        # Not a generator, so that workers start now and not at the first batch.
        return map(logged, super().__iter__())


def _with_problems(collate: Callable[[Sequence[Sample]], Any], batch: SampleBatch) -> tuple[Any, SampleBatch]:
    """The collated samples of a batch, and its problems beside them."""
    return collate(batch.samples), batch._replace(samples=[])
