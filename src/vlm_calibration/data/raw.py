"""Batches of queries with unperturbed images, for region extraction.

The queries of each source are divided into shards of a fixed size, which are numbered over all sources, and each shard into batches. A process takes whole shards, so
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


class Shard(NamedTuple):
    """Consecutive queries of one source, which one process extracts.

    Attributes:
        number: of the shard, over all sources.
        source: index of the source.
        begin: index of the first query in the source.
        end: index after the last one.
    """

    number: int
    source: int
    begin: int
    end: int


def shards_of(lengths: Sequence[int], shard_size: int) -> list[Shard]:
    """All shards of sources with these numbers of queries; the last shard of a source may be smaller than `shard_size`."""
    spans = [
        (source, begin, min(begin + shard_size, length))
        for source, length in enumerate(lengths)
        for begin in range(0, length, shard_size)
    ]
    return [Shard(number, *span) for number, span in enumerate(spans)]


class RawBatches(Dataset[RawBatch]):
    """The batches of some shards of one or several sources.

    A process without a shard gets one empty batch, so that it takes part in the hooks after the last batch.

    Args:
        sources: the sources.
        shards: the shards, in order.
        batch_size: queries per batch; the last batch of a shard may be smaller.
        done: number of queries of the shards that an earlier run finished.
        total: that and the number of queries that all processes of this run have; None: only this process has any.
    """

    def __init__(
        self,
        sources: Sequence[QuerySource],
        shards: Sequence[Shard],
        batch_size: int,
        done: int = 0,
        total: int | None = None,
    ) -> None:
        self.sources = sources
        self.queries = [source.queries() for source in sources]
        self.done = done
        self.total = done + sum(shard.end - shard.begin for shard in shards) if total is None else total
        self._batches = [
            shard._replace(begin=begin, end=min(begin + batch_size, shard.end))
            for shard in shards
            for begin in range(shard.begin, shard.end, batch_size)
        ]

    def __len__(self) -> int:
        return max(1, len(self._batches))

    def __getitem__(self, index: int) -> RawBatch:
        if not self._batches:
            if index:
                raise IndexError(index)
            return RawBatch([], NO_SHARD, False)
        number, source, begin, end = self._batches[index]
        is_last = index + 1 == len(self._batches) or self._batches[index + 1].number != number
        rows = _load(self.sources[source], self.queries[source][begin:end])
        return RawBatch(rows, number, is_last)


def _load(source: QuerySource, queries: Sequence[Query]) -> list[RawQuery]:
    """Queries with their images; an image that several of them share is loaded once."""
    images: dict[str, np.ndarray] = {}
    rows = []
    for query in queries:
        try:
            if query.image not in images:
                images[query.image] = source.load(query).image
            rows.append(RawQuery(query, images[query.image]))
        except DataError as error:
            rows.append(RawQuery(query, None, str(error)))
    return rows
