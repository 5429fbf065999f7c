"""Queries from a JSONL file, images from a folder: the format for data of one's own."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path

from vlm_calibration.data.sources.base import (
    BadRecords,
    LazyQueries,
    OnBadRecord,
    QuerySource,
    with_regions,
)
from vlm_calibration.data.sources.images import ImageFolder
from vlm_calibration.perturbation.images import ImageError
from vlm_calibration.records import DataError, LoadedImage, Query, RecordError, query_from_dict
from vlm_calibration.text.labels import check_answer

PARQUET = b"PAR1"
"""How a Parquet file begins."""
KNOWN_FILES = 100_000
"""So many names of images that were found to exist are remembered while a file is read."""


class JsonlSource(QuerySource):
    """One query as a JSON object on each line; blank lines are passed over.

    Every line is checked when the file is opened; after that only the places of the lines stay in memory, and a query is
    read from the file when it is asked for.

    Args:
        path: the JSONL file.
        root: folder that image paths are relative to; by default the folder of `path`. No image may lie outside it.
        on_bad_record: "raise" stops at the first record that cannot be used; "skip" leaves such records out, and says
            how many and why.
    """

    def __init__(self, path: str, root: str | None = None, on_bad_record: OnBadRecord = "raise") -> None:
        self.path = Path(path)
        self.root = Path(root) if root is not None else self.path.parent
        self.on_bad_record = on_bad_record
        self.images = ImageFolder(self.root)
        self.bad = BadRecords(on_bad_record)
        self._places: array[int] | None = None

    def queries(self) -> Sequence[Query]:
        if self._places is None:
            self._places = self._check()
        return LazyQueries(len(self._places), self._query)

    def _check(self) -> array[int]:
        """Where in the file each usable record begins."""
        self.bad = BadRecords(self.on_bad_record)
        seen: dict[str, int] = {}
        files: set[str] = set()
        places = array("q")
        try:
            lines = self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.path}: cannot read the queries: {error.strerror}") from error
        with lines:
            if lines.read(len(PARQUET)) == PARQUET:
                raise DataError(
                    f"{self.path}: a Parquet file, expected JSON lines: read it with "
                    "class_path: vlm_calibration.data.sources.parquet.ParquetSource"
                )
            lines.seek(0)
            place = 0
            for number, line in enumerate(lines, start=1):
                begin, place = place, place + len(line)
                if not line.strip():
                    continue
                try:
                    query = _parse(line)
                    check_answer(query)
                    self._check_image(query, files)
                    if query.id in seen:
                        raise RecordError(f"duplicate id {query.id!r}, first seen on line {seen[query.id]}")
                except RecordError as error:
                    self.bad.add(f"{self.path}:{number}: {error}", error)
                    continue
                seen[query.id] = number
                places.append(begin)
        self.bad.report(len(places))
        if not places:
            raise DataError(f"{self.path}: no usable query in this file")
        return places

    def _check_image(self, query: Query, files: set[str]) -> None:
        if query.image in files:
            return
        try:
            self.images.check(query.image)
        except RecordError as error:
            raise RecordError(f"record {query.id!r}: {error}") from error
        if len(files) < KNOWN_FILES:
            files.add(query.image)

    def _query(self, index: int) -> Query:
        assert self._places is not None
        try:
            with self.path.open("rb") as file:
                file.seek(self._places[index])
                return _parse(file.readline())
        except (OSError, RecordError) as error:
            raise DataError(f"{self.path}: changed while in use, at record {index + 1}: {error}") from error

    def load(self, query: Query) -> LoadedImage:
        try:
            return with_regions(query, self.images.load(query.image))
        except (RecordError, ImageError) as error:
            raise self.bad.error(f"{self.path}: record {query.id!r}: {error}") from error


def _parse(line: bytes) -> Query:
    try:
        data = json.loads(line)
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}") from error
    return query_from_dict(data)
