"""Batches of queries with unperturbed images, for region extraction.

The queries of a source are divided into shards of a fixed size, and each shard into batches. A process takes whole shards, so
the content of a batch depends neither on the number of processes nor on an earlier run.
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
    """A query with its image, or the problem of loading it.

    Attributes:
        query: the query.
        image: uint8 [H, W, 3]; None: it could not be loaded.
        problem: why it could not be loaded.
    """

    query: Query
    image: np.ndarray | None
    problem: str | None = None


@dataclass
class RawBatch:
    """Consecutive queries of one shard.

    Attributes:
        rows: the queries.
        shard: number of the shard, or NO_SHARD.
        last: whether this is the last batch of the shard.
    """

    rows: list[RawQuery]
    shard: int
    last: bool

    def to(self, *_: Any, **__: Any) -> RawBatch:
        """The batch itself, for any device: images are not tensors yet."""
        return self


class RawBatches(Dataset[RawBatch]):
    """The batches of some shards of a source.

    A process without a shard gets one empty batch, so that it takes part in the hooks after the last batch.

    Args:
        source: the source.
        shard_size: queries per shard; the last shard may be smaller.
        batch_size: queries per batch; the last batch of a shard may be smaller.
        shards: numbers of the shards, in order.
        finished: shards that an earlier run finished.
        pending: shards that all processes of this run have, `shards` among them; None: only `shards`.

    Attributes:
        done: number of queries of the finished shards.
        total: number of queries of the finished and the pending shards.
    """

    def __init__(
        self,
        source: QuerySource,
        shard_size: int,
        batch_size: int,
        shards: Sequence[int],
        finished: Sequence[int] = (),
        pending: Sequence[int] | None = None,
    ) -> None:
        self.source = source
        self.queries = source.queries()
        sizes = [
            sum(min(shard_size, len(self.queries) - shard * shard_size) for shard in numbers)
            for numbers in (finished, shards if pending is None else pending)
        ]
        self.done, self.total = sizes[0], sum(sizes)
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
        for position in range(first, stop):
            query = self.queries[position]
            try:
                if query.image not in images:
                    images[query.image] = self.source.load(query).image
                rows.append(RawQuery(query, images[query.image]))
            except DataError as error:
                rows.append(RawQuery(query, None, str(error)))
        return RawBatch(rows, shard, last)


def shard_count(queries: int, shard_size: int) -> int:
    """The number of shards of a number of queries."""
    return -(-queries // shard_size)
