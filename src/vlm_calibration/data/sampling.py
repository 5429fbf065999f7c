"""In which order samples are drawn, by whom: a pure function of (seed, epoch, number of processes).

The sampler hands out (epoch, index) pairs, so that worker processes, which live on from epoch to epoch, know which epoch's
noise a sample gets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler


class DataPosition(NamedTuple):
    """A place in the training data: behind `batch` batches of epoch `epoch`.

    queries: how many an epoch has. batch_size: queries a batch, of all processes together.
    """

    epoch: int = 0
    batch: int = 0
    queries: int = 0
    batch_size: int = 0


class EpochSampler(DistributedSampler):
    """Shards `length` samples over processes and yields (epoch, index).

    It is a `DistributedSampler` so that Lightning neither wraps nor replaces it, and tells it the epoch.

    Args:
        length: number of samples.
        shuffle: a new order each epoch. Otherwise in order.
        even: every process gets the same number (training, where a process with fewer would leave the others waiting):
            the remainder of at most `num_replicas` - 1 samples is left out, another one each epoch where shuffled.
            Otherwise each sample is drawn by exactly one process (evaluation): none twice, none left out.
        done: places of samples that are not to be drawn, where not `even`. Which process draws which of the others does
            not depend on them.
    """

    def __init__(
        self,
        length: int,
        *,
        rank: int,
        num_replicas: int,
        shuffle: bool,
        even: bool,
        seed: int = 0,
        done: Collection[int] = (),
    ) -> None:
        # The base class wants a dataset only to ask for its length.
        super().__init__(range(length), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.length = length
        self.even = even
        self.begin = (0, 0)
        self._open = np.ones(length, dtype=bool)
        self._open[list(done)] = False

    def begin_at(self, epoch: int, batch: int, batch_size: int) -> None:
        """Begin in this epoch, behind so many batches of `batch_size` samples of this process; later epochs are whole."""
        self.set_epoch(epoch)
        self.begin = (epoch, batch * batch_size)

    def places(self) -> np.ndarray:
        """The samples of this process in the present epoch, in the order in which they are drawn."""
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        if self.even:
            order = order[: len(self) * self.num_replicas]
        own = order[self.rank :: self.num_replicas]
        return own if self.even else own[self._open[own]]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch if self.shuffle else 0
        first, done = self.begin
        return iter([(epoch, int(i)) for i in self.places()[done if epoch == first else 0 :]])

    def __len__(self) -> int:
        """Samples of a whole epoch."""
        if self.even:
            return self.length // self.num_replicas
        return len(self.places())
