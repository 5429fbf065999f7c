"""Queries with their images as they are, in batches that are the same whoever makes them: what region extraction runs on.

The queries of a source are cut into shards of a fixed size, and each shard into batches. A process takes whole shards, so what
is in a batch depends neither on the number of processes nor on what was done in an earlier run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.records import DataError, Query

NO_SHARD = -1


class RawQuery(NamedTuple):
    """A query with its image, uint8 [H, W, 3], or with the problem that there was in reading it."""

    query: Query
    image: np.ndarray | None
    problem: str | None = None


@dataclass
class RawBatch:
    """Consecutive queries of one shard.

    Attributes:
        shard: number of the shard. last: whether it ends with this batch.
    """

    rows: list[RawQuery]
    shard: int
    last: bool

    def to(self, *_: Any, **__: Any) -> RawBatch:
        """The batch itself, on whatever device: images are no tensors yet."""
        return self


class RawBatches(Dataset[RawBatch]):
    """The batches of some shards of a source, one an index.

    A process that has no shard gets one empty batch, so that it takes part in what comes after the last one.

    Args:
        shard_size, batch_size: queries of each, but for the last ones.
        shards: numbers of the shards, in order.
    """

    def __init__(self, source: QuerySource, shard_size: int, batch_size: int, shards: Sequence[int]) -> None:
        self.source = source
        self.queries = source.queries()
        self._spans: list[tuple[int, int, int, bool]] = []
        for shard in shards:
            begin, end = shard * shard_size, min((shard + 1) * shard_size, len(self.queries))
            for first in range(begin, end, batch_size):
                stop = min(first + batch_size, end)
                self._spans.append((shard, first, stop, stop == end))

    def __len__(self) -> int:
        return max(1, len(self._spans))

    def __getitem__(self, index: int) -> RawBatch:
        if not self._spans:
            if index:
                raise IndexError(index)
            return RawBatch([], NO_SHARD, False)
        shard, first, stop, last = self._spans[index]
        images: dict[str, np.ndarray] = {}
        rows = []
        for place in range(first, stop):
            query = self.queries[place]
            try:
                if query.image not in images:
                    images[query.image] = self.source.load(query).image
                rows.append(RawQuery(query, images[query.image]))
            except DataError as error:
                rows.append(RawQuery(query, None, str(error)))
        return RawBatch(rows, shard, last)


def shard_count(queries: int, shard_size: int) -> int:
    return -(-queries // shard_size)
