"""Extracted regions: which sources need them, the batches that `predict` reads, and reading a source with its regions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.sources.base import QuerySource, queries_digest
from vlm_calibration.data.sources.parquet import ParquetSource, schema_of
from vlm_calibration.files import name_some
from vlm_calibration.records import DataError, Query
from vlm_calibration.settings import settings_digest

NOTE = b"vlm_calibration.extracted_from"  # key of the metadata of a file of regions


class Extraction(NamedTuple):
    """A source whose regions are extracted into one file, the settings below `data` that hold it, and number and digest of its queries."""

    file: str
    source: QuerySource
    settings: tuple[str, ...]
    queries: int
    content: str

    @property
    def note(self) -> dict[bytes, bytes]:
        """The metadata of the file, by which `read_with_regions` finds it."""
        note = {"settings": self.settings, "queries": self.queries, "content": self.content}
        return {NOTE: json.dumps(note).encode()}


def unlocated(source: QuerySource) -> list[str]:
    """The ids of the queries that need a region and have none."""
    return [query.id for query in source.queries() if source.presence(query) == "unlocated"]


class RawQuery(NamedTuple):
    """A query with its image, uint8 [H, W, 3], or None and the reason why it could not be loaded."""

    query: Query
    image: np.ndarray | None
    problem: str | None = None


@dataclass
class RawBatch:
    """The queries of the shard with this number; without queries for a process that has no shard."""

    rows: list[RawQuery]
    shard: int

    def to(self, *_: Any, **__: Any) -> RawBatch:
        """The batch itself, for any device: images are not tensors yet."""
        return self


class RegionPlan(Dataset[RawBatch]):
    """What `predict` extracts: each source with noise once, in shards that parts and processes share; an item is the batch of a shard.

    Settings whose sources have the same class, arguments and queries share a file. With `keep_known` the sources are left out in which
    every query has a region or needs none.

    Attributes:
        complete: the settings of the sources that `keep_known` leaves out.
        shards: the extraction's index and the queries of each shard, by its number.
        finished: numbers of the shards that an earlier run finished.
    """

    def __init__(self, splits: Mapping[str, EvalSplit], shard_size: int, keep_known: bool) -> None:
        self.extractions: list[Extraction] = []
        self.complete: list[str] = []
        self.finished: Collection[int] = ()
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for setting, split in splits.items():
            if split.noise != "none":
                groups[settings_digest(split.source), queries_digest(split.source)].append(setting)
        for (_, content), settings in groups.items():
            source = splits[settings[0]].source
            if keep_known and not unlocated(source):
                self.complete += settings
                continue
            file, total = f"{quote(settings[0], safe='')}.parquet", len(source.queries())
            self.extractions.append(Extraction(file, source, tuple(settings), total, content))
        self.shards = [
            (index, range(begin, min(begin + shard_size, extraction.queries)))
            for index, extraction in enumerate(self.extractions)
            for begin in range(0, extraction.queries, shard_size)
        ]
        self._queries = [extraction.source.queries() for extraction in self.extractions]

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int | None) -> RawBatch:
        """The queries of a shard with their unperturbed images; an empty batch for None."""
        if number is None:
            return RawBatch([], -1)
        index, shard = self.shards[number]
        source = self.extractions[index].source
        images: dict[str, np.ndarray] = {}
        rows = []
        for query in self._queries[index][shard.start : shard.stop]:
            try:
                if query.image not in images:  # which several queries may share
                    images[query.image] = source.load(query).image
                rows.append(RawQuery(query, images[query.image]))
            except DataError as error:
                rows.append(RawQuery(query, None, str(error)))
        return RawBatch(rows, number)


def read_with_regions(folder: Path, setting: str, source: QuerySource) -> QuerySource:
    """The queries of a source with the regions of `folder`; images, and wrong answers to open queries, are the source's own.

    A source without a file is returned itself if no query lacks a region. A DataError if queries do, or if the file of `setting` was
    extracted from other queries.
    """
    n_queries, content = len(source.queries()), queries_digest(source)
    files = sorted(folder.glob("*.parquet"))
    notes = [(p, json.loads((schema_of(p).metadata or {}).get(NOTE, b"{}"))) for p in files]
    # Of several files from equal queries, the one that was extracted for this setting comes first.
    notes.sort(key=lambda item: setting not in item[1].get("settings", ()))
    for path, note in notes:
        if note.get("content") == content:
            return ParquetSource(str(path), images=source, on_bad_record=source.on_bad_record)
    again = "extract regions with `vlm-calibration predict --config regions` and the same data settings"
    for path, note in notes[:1]:
        if setting in note.get("settings", ()):
            source_now = f"it has {n_queries}, content {content[:8]}"
            problem = f"{note['queries']} queries that data.{setting} no longer holds ({source_now})"
            raise DataError(f"{path}: extracted from {problem}: remove the folder and {again}")
    if missing := unlocated(source):
        held = f"it holds {name_some((path.name for path in files), len(files))}" if files else "no file"
        needed = f"{len(missing)} of {n_queries} queries need one: {name_some(missing, len(missing))}"
        clean = "ask such queries with untouched images (`data.noise.no_region: clean`)"
        advice = f"{again}, or set data.regions to null and {clean}"
        raise DataError(f"{folder}: no regions for data.{setting}, where {needed}; found: {held}: {advice}")
    rank_zero_info(f"data.{setting}: no query lacks a region that it needs, so none are read from {folder}")
    return source
