"""Source for one's own data: queries in a JSONL file, images in a folder."""

from __future__ import annotations

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
from vlm_calibration.data.sources.checks import RecordChecks
from vlm_calibration.data.sources.data_root import MissingFileError
from vlm_calibration.data.sources.images import ImageFolder
from vlm_calibration.files import json_lines, parse_json
from vlm_calibration.perturbation.images import ImageError
from vlm_calibration.progress import track
from vlm_calibration.records import DataError, LoadedImage, Query, RecordError, query_from_dict

PARQUET = b"PAR1"
"""The first bytes of a Parquet file."""
MB = 1e6


class JsonlSource(QuerySource):
    """One query a line, a JSON object; blank lines are skipped.

    Every line is checked when `queries` is first called. After that only the offsets of the lines stay in memory, and a query
    is read from the file on access.

    Args:
        path: the JSONL file.
        root: folder that image paths are relative to; by default the folder of `path`. No image may lie outside it.
        on_bad_record: "raise" stops at the first invalid record; "skip" leaves such records out, with a warning.
    """

    def __init__(self, path: str, root: str | None = None, on_bad_record: OnBadRecord = "raise") -> None:
        self.path = Path(path)
        self.root = Path(root) if root is not None else self.path.parent
        self.on_bad_record = on_bad_record
        self.images = ImageFolder(self.root)
        self.bad = BadRecords(on_bad_record)
        self._offsets: array[int] | None = None

    def queries(self) -> Sequence[Query]:
        if self._offsets is None:
            self._offsets = self._check_lines()
        return LazyQueries(len(self._offsets), self._query)

    def _check_lines(self) -> array[int]:
        """Offsets of the lines that hold a valid query."""
        if not self.path.exists():
            raise MissingFileError(self.path)
        self.bad = BadRecords(self.on_bad_record)
        checks = RecordChecks(self.images, "on line")
        offsets = array("q")
        size = self.path.stat().st_size / MB if self.path.is_file() else 0.0
        lines = json_lines(self.path)
        for line in track(lines, f"checking {self.path}", size, "MB", lambda line: len(line.content) / MB):
            if line.number == 1 and line.content.startswith(PARQUET):
                raise DataError(
                    f"{self.path}: a Parquet file, expected JSON lines: read it with "
                    "class_path: vlm_calibration.data.sources.parquet.ParquetSource"
                )
            try:
                checks.check(query_from_dict(parse_json(line.content)), line.number)
            except RecordError as error:
                self.bad.add(f"{line.where}: {error}", error)
            else:
                offsets.append(line.offset)
        self.bad.report(len(offsets))
        if not offsets:
            raise DataError(f"{self.path}: no usable query in this file")
        return offsets

    def line(self, index: int) -> bytes:
        """The line of one of `queries` as it is in the file."""
        assert self._offsets is not None, "`queries` is called first"
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            return file.readline()

    def _query(self, index: int) -> Query:
        try:
            return query_from_dict(parse_json(self.line(index)))
        except (OSError, RecordError) as error:
            raise DataError(f"{self.path}: changed while in use, at record {index + 1}: {error}") from error

    def image_file(self, query: Query) -> Path:
        return self.images.path(query.image)

    def load(self, query: Query) -> LoadedImage:
        try:
            return with_regions(query, self.images.load(query.image))
        except (RecordError, ImageError) as error:
            raise self.bad.error(f"{self.path}: record {query.id!r}: {error}") from error
