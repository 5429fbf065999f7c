"""Which sources of a configuration need extracted regions, which file holds them, and reading a source with the regions of its file.

A query needs a region where noise is added to it, so a split without noise is read as it is. `vlm-calibration predict` writes one
Parquet file for each source with a query that needs a region and has none. The file notes a digest of the queries from which the
regions were extracted: a later stage finds the file by it, and refuses a file that belongs to other queries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info

from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.sources.base import QuerySource, queries_digest
from vlm_calibration.data.sources.parquet import ParquetSource, schema_of
from vlm_calibration.files import name_some
from vlm_calibration.records import DataError
from vlm_calibration.settings import settings_digest

SINGLE = "queries.parquet"
"""The file of `data.predict`."""
NOTE = b"vlm_calibration.extracted_from"
"""Key of the metadata of a file of regions."""
FIRST = ("train", "validation", "calibration", "levels", "test")
"""A file is named after the first of these settings that holds its source."""


class Contents(NamedTuple):
    """The queries of a source.

    Attributes:
        queries: their number.
        content: digest of all their fields.
    """

    queries: int
    content: str


class Extraction(NamedTuple):
    """A source whose regions are extracted into one file.

    Attributes:
        file: name of the file.
        source: the source.
        settings: the settings below `data` that hold this source, e.g. ("train",) or ("levels", "calibration.own").
        contents: its queries.
    """

    file: str
    source: QuerySource
    settings: tuple[str, ...]
    contents: Contents

    @property
    def note(self) -> dict[bytes, bytes]:
        """The metadata of the file, by which `read_with_regions` finds it."""
        return {NOTE: json.dumps({"settings": self.settings, **self.contents._asdict()}).encode()}


class RegionPlan(NamedTuple):
    """What an extraction has to do.

    Attributes:
        extractions: the sources to extract regions for.
        complete: settings of the sources whose queries are noised and have all the regions that they need.
    """

    extractions: list[Extraction]
    complete: list[str]


def contents_of(source: QuerySource) -> Contents:
    """Number and digest of the queries of a source; reads them all."""
    return Contents(len(source.queries()), queries_digest(source))


def unlocated(source: QuerySource) -> list[str]:
    """The ids of the queries that need a region and have none."""
    return [query.id for query in source.queries() if source.presence(query) == "unlocated"]


def single_extraction(source: QuerySource) -> Extraction:
    """The extraction of `data.predict`."""
    return Extraction(SINGLE, source, ("predict",), contents_of(source))


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


def _file_names(groups: Iterable[list[str]]) -> list[str]:
    """One name a group of settings: "test.parquet", or "test.clean.parquet" if several groups begin with a setting of `data.test`."""
    first = [min(settings, key=lambda setting: FIRST.index(_section(setting))) for settings in groups]
    sections = [_section(setting) for setting in first]
    names: list[str] = []
    for setting, section in zip(first, sections, strict=True):
        name = section if sections.count(section) == 1 else re.sub(r"[^\w.-]", "_", setting)
        while f"{name}.parquet" in names:
            name += "_"
        names.append(f"{name}.parquet")
    return names


def _section(setting: str) -> str:
    return setting.partition(".")[0]


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
        source: the source that regions were extracted for. If the folder has no file for it and every query has the regions that
            it needs, the source itself is returned.

    Raises:
        DataError: the file was extracted from other queries, or there is none and queries need regions.
    """
    contents = contents_of(source)
    notes = {path: _read_note(path) for path in sorted(folder.glob("*.parquet"))}
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


def _read_note(path: Path) -> dict[str, Any]:
    """The note of a file of regions; empty for another Parquet file."""
    return json.loads((schema_of(path).metadata or {}).get(NOTE, b"{}"))
