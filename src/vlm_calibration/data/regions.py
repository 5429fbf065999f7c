"""Extracted regions: which sources need them, the batches that `predict` reads, and reading a source with its regions.

A query needs a region where noise is added to it, so a split without noise is read as it is. `vlm-calibration predict` writes one
Parquet file for each source with a query that needs a region and has none. The file notes a digest of the queries from which the
regions were extracted: a later stage finds the file by it, and refuses a file that belongs to other queries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.sources.base import QuerySource, queries_digest
from vlm_calibration.data.sources.parquet import ParquetSource, schema_of
from vlm_calibration.files import name_some
from vlm_calibration.records import DataError, Query
from vlm_calibration.settings import settings_digest

SINGLE = "queries.parquet"
"""The file of `data.predict`."""
NOTE = b"vlm_calibration.extracted_from"
"""Key of the metadata of a file of regions."""
FIRST = ("train", "validation", "calibration", "levels", "test")
"""A file is named after the first of these settings that holds its source."""
NO_SHARD = -1


class Contents(NamedTuple):
    """The number of queries of a source, and the digest of all their fields."""

    queries: int
    content: str


class Extraction(NamedTuple):
    """A source whose regions are extracted into one file, and the settings below `data` that hold it, e.g. ("levels", "calibration.own")."""

    file: str
    source: QuerySource
    settings: tuple[str, ...]
    contents: Contents

    @property
    def note(self) -> dict[bytes, bytes]:
        """The metadata of the file, by which `read_with_regions` finds it."""
        return {NOTE: json.dumps({"settings": self.settings, **self.contents._asdict()}).encode()}


class RegionPlan(NamedTuple):
    """The sources to extract regions for, and the settings of those that are noised and have all the regions that they need."""

    extractions: list[Extraction]
    complete: list[str]


def contents_of(source: QuerySource) -> Contents:
    """Number and digest of the queries of a source; reads them all."""
    return Contents(len(source.queries()), queries_digest(source))


def unlocated(source: QuerySource) -> list[str]:
    """The ids of the queries that need a region and have none."""
    return [query.id for query in source.queries() if source.presence(query) == "unlocated"]


def plan_extraction(splits: Mapping[str, EvalSplit], keep_known: bool) -> RegionPlan:
    """The sources to extract regions for, each once.

    Two settings share a file if their sources have the same class, arguments and queries.

    Args:
        splits: setting below `data` -> source and noise.
        keep_known: leave out the sources in which every query has a region or needs none.

    Raises:
        DataError: the queries of a source cannot be read.
    """
    groups: dict[tuple[str, Contents], list[str]] = {}
    clean: dict[str, list[str]] = {}
    for setting, split in splits.items():
        kind = settings_digest(split.source)
        if split.noise == "none":
            clean.setdefault(kind, []).append(setting)
        else:
            groups.setdefault((kind, contents_of(split.source)), []).append(setting)
    files: dict[str, Extraction] = {}
    complete: list[str] = []
    # A clean split shares the name of a file that has the regions of its source, and needs none itself.
    names = _file_names([[*settings, *clean.get(kind, ())] for (kind, _), settings in groups.items()])
    for name, ((_, contents), settings) in zip(names, groups.items(), strict=True):
        source = splits[settings[0]].source
        if keep_known and not unlocated(source):
            complete += settings
        else:
            files[name] = Extraction(name, source, tuple(settings), contents)
    return RegionPlan(list(files.values()), complete)


def _file_names(groups: Sequence[list[str]]) -> list[str]:
    """One name a group of settings: "test.parquet", or "test.clean.parquet" if several groups begin with a setting of `data.test`."""
    sections = {setting: setting.partition(".")[0] for settings in groups for setting in settings}
    first = [min(settings, key=lambda setting: FIRST.index(sections[setting])) for settings in groups]
    taken = [sections[setting] for setting in first]
    names: list[str] = []
    for setting, section in zip(first, taken, strict=True):
        name = section if taken.count(section) == 1 else re.sub(r"[^\w.-]", "_", setting)
        while f"{name}.parquet" in names:
            name += "_"
        names.append(f"{name}.parquet")
    return names


def split_with_regions(folder: Path, setting: str, split: EvalSplit) -> EvalSplit:
    """A split that reads its queries with the regions in a folder; one without noise needs no region and stays as it is."""
    if split.noise == "none":
        return split
    return replace(split, source=read_with_regions(folder, setting, split.source))


def read_with_regions(folder: Path, setting: str, source: QuerySource) -> QuerySource:
    """The queries of a source with their extracted regions; images, and wrong answers to open queries, are the source's own.

    Args:
        folder: holds the files that `vlm-calibration predict` wrote.
        setting: the setting below `data` that holds the source.
        source: the source that regions were extracted for; returned itself if it has no file and every query has what it needs.

    Raises:
        DataError: the file was extracted from other queries, or there is none and queries need regions.
    """
    contents = contents_of(source)
    notes: dict[Path, dict[str, Any]] = {
        path: json.loads((schema_of(path).metadata or {}).get(NOTE, b"{}"))
        for path in sorted(folder.glob("*.parquet"))
    }
    # Of several files from equal queries, the one that was extracted for this setting comes first.
    for_setting = sorted(notes, key=lambda path: setting not in notes[path].get("settings", ()))
    for path in for_setting:
        if (notes[path].get("queries"), notes[path].get("content")) == contents:
            return ParquetSource(str(path), images=source, on_bad_record=source.on_bad_record)
    again = "extract regions with `vlm-calibration predict --config regions` and the same data settings"
    if for_setting and setting in notes[for_setting[0]].get("settings", ()):
        path = for_setting[0]
        raise DataError(
            f"{path}: extracted from {notes[path]['queries']} queries that data.{setting} no longer holds (it has "
            f"{contents.queries}, content {contents.content[:8]}): remove the folder and {again}"
        )
    if missing := unlocated(source):
        held = f"it holds {name_some((path.name for path in notes), len(notes))}" if notes else "no file"
        raise DataError(
            f"{folder}: no regions for data.{setting}, where {len(missing)} of {contents.queries} queries need one: "
            f"{name_some(missing, len(missing))}; found: {held}: {again}, or set data.regions to null and ask "
            "such queries with untouched images (`data.noise.no_region: clean`)"
        )
    rank_zero_info(
        f"data.{setting}: every query has the regions that it needs, so none are read from {folder}"
    )
    return source


class RawQuery(NamedTuple):
    """A query with its image, uint8 [H, W, 3], or None and the reason why it could not be loaded."""

    query: Query
    image: np.ndarray | None
    problem: str | None = None


@dataclass
class RawBatch:
    """Consecutive queries of the shard with this number, or none of NO_SHARD; `last`: the last ones of the shard."""

    rows: list[RawQuery]
    shard: int
    last: bool

    def to(self, *_: Any, **__: Any) -> RawBatch:
        """The batch itself, for any device: images are not tensors yet."""
        return self


class Shard(NamedTuple):
    """Queries `begin` to `end` of the source with this index, which one process extracts; numbered over all sources."""

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
    """The batches of some shards of one or several sources, with unperturbed images.

    A process takes whole shards, so the content of a batch depends neither on the number of processes nor on an earlier run. A
    process without a shard gets one empty batch, so that it takes part in the hooks after the last batch.

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
        images: dict[str, np.ndarray] = {}
        rows = []
        for query in self.queries[source][begin:end]:
            try:
                if query.image not in images:  # which several queries may share
                    images[query.image] = self.sources[source].load(query).image
                rows.append(RawQuery(query, images[query.image]))
            except DataError as error:
                rows.append(RawQuery(query, None, str(error)))
        return RawBatch(rows, number, is_last)
