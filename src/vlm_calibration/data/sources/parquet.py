"""Source for Parquet files: the output of `vlm-calibration predict`, and large data of one's own.

The columns are the keys of a query. Images are files below a data root, are embedded in the file, or come from another source. Texts
stay in memory as Arrow arrays, about one byte a character. Embedded images do not: a row group of them is read at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
from vlm_calibration.files import first_line
from vlm_calibration.perturbation.images import ImageError, load_image
from vlm_calibration.progress import track
from vlm_calibration.records import DataError, LoadedImage, Query, RecordError, query_from_dict

_TEXT = pa.string()
REGION = pa.struct(
    [
        ("label", _TEXT),
        ("box", pa.list_(pa.float64())),
        ("mask", pa.struct([("size", pa.list_(pa.int64())), ("counts", _TEXT)])),
        ("score", pa.float64()),
    ]
)
"""Type of a region in Parquet."""

REQUIRED = dict.fromkeys(("id", "image", "question", "answer", "answer_type"), _TEXT)
OPTIONAL = {
    "objects": pa.list_(_TEXT),
    "regions": pa.list_(REGION),
    "category": _TEXT,
    "synonyms": pa.list_(_TEXT),
    "absent": pa.list_(_TEXT),
    "wrong_answers": pa.list_(_TEXT),
}
NOTES = ("outcome", "rejected", "note")
"""Columns with the outcome of `predict`; not part of a query."""
ROW = "row-"
"""Prefix of the name of an embedded image: "row-17"."""
BATCH = 1000
"""Rows that are decoded at once when a file is checked."""


class ParquetSource(QuerySource):
    """One query a row. Every row is checked when `queries` is first called.

    Args:
        path: a Parquet file, or a folder of them, read in the order of their names.
        root: folder that image paths are relative to; by default the folder of `path`. No image may lie outside it.
        images: the source that loads the images, e.g. the one that regions were extracted from; the column `image` holds its
            image names. None: images are files or embedded ({bytes, path}).
        begin: use the queries from this share on, in [0, 1]. With `end`, one file serves for training and validation, since
            queries about one image are mostly adjacent.
        end: use the queries up to this share, in [0, 1].
        on_bad_record: "raise" stops at the first invalid record; "skip" leaves such records out, with a warning.
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        images: QuerySource | None = None,
        begin: float = 0.0,
        end: float = 1.0,
        on_bad_record: OnBadRecord = "raise",
    ) -> None:
        if not 0 <= begin < end <= 1:
            raise DataError(f"ParquetSource: needs 0 <= begin < end <= 1, found {begin} and {end}")
        self.path = Path(path)
        folder = self.path if self.path.is_dir() else self.path.parent
        self.root = Path(root) if root is not None else folder
        self.images = images
        self.begin, self.end = begin, end
        self.on_bad_record = on_bad_record
        self.bad = BadRecords(on_bad_record)
        self._folder = ImageFolder(self.root)
        self._rows: np.ndarray | None = None
        self._cached: tuple[int, Any] | None = None

    def queries(self) -> Sequence[Query]:
        return LazyQueries(len(self.row_numbers()), self._query)

    def row_numbers(self) -> np.ndarray:
        """Row of each of `queries` in the file, or in the files of the folder as if they were one; int64 [N]."""
        if self._rows is None:
            self._open()
            rows = self._valid_rows()
            self._rows = rows[round(self.begin * len(rows)) : round(self.end * len(rows))]
            if not len(self._rows):
                raise DataError(
                    f"{self.path}: none of its {len(rows)} queries is between the shares {self.begin:g} and {self.end:g}: move "
                    "begin and end, or use more queries"
                )
        return self._rows

    def _open(self) -> None:
        """Read the texts of all files into one table, and find the row groups of embedded images."""
        if not self.path.exists():
            raise MissingFileError(self.path)
        is_folder = self.path.is_dir()
        files = sorted(f for f in self.path.glob("*.parquet") if f.is_file()) if is_folder else [self.path]
        if not files:
            raise DataError(f"{self.path}: cannot read the queries: no *.parquet file in this folder")
        schema = schema_of(files[0])
        for name in (n for n in schema.names if n not in {**REQUIRED, **OPTIONAL} and n not in NOTES):
            known = ", ".join([*REQUIRED, *OPTIONAL])
            raise DataError(f"{self.path}: unknown column {name!r}; a query has the columns {known}")
        for name in (n for n in REQUIRED if n not in schema.names):
            raise DataError(f"{self.path}: no column {name!r}")
        image = schema.field("image").type
        self._is_embedded = pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
        columns = [n for n in schema.names if n not in NOTES and not (n == "image" and self._is_embedded)]
        self._groups: list[tuple[Path, int]] = []
        lengths: list[int] = []
        tables: list[pa.Table] = []
        for file in files:
            try:
                metadata = pq.read_metadata(file)
                tables.append(pq.read_table(file, columns=columns))
                self._table = pa.concat_tables(tables, promote_options="permissive")
            except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                raise DataError(
                    f"{file}: cannot read the columns {', '.join(columns)}: {first_line(error)}"
                ) from error
            self._groups += [(file, i) for i in range(metadata.num_row_groups)]
            lengths += [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = list(accumulate(lengths))

    def _valid_rows(self) -> np.ndarray:
        """Indices of the rows that hold a valid query, int64, ascending."""
        self.bad = BadRecords(self.on_bad_record)
        has_files = self.images is None and not self._is_embedded
        checks = RecordChecks(self._folder, "in row")
        valid: list[int] = []
        batches = self._table.to_batches(max_chunksize=BATCH)
        records = (record for batch in batches for record in batch.to_pylist())
        total = self._table.num_rows
        for row, record in enumerate(track(records, f"checking {self.path}", total, "records")):
            try:
                checks.check(self._make(row, record), row, has_files)
            except RecordError as error:
                self.bad.add(f"{self.path}: row {row}: {error}", error)
            else:
                valid.append(row)
        self.bad.report(len(valid))
        if not valid:
            raise DataError(f"{self.path}: no usable query in this file")
        return np.array(valid, dtype=np.int64)

    def _make(self, row: int, record: dict[str, Any]) -> Query:
        if self._is_embedded:
            record["image"] = f"{ROW}{row}"
        if isinstance(regions := record.get("regions"), list):
            record["regions"] = [_without_nulls(region) for region in regions]
        return query_from_dict(record)

    def _query(self, index: int) -> Query:
        row = int(self.row_numbers()[index])
        return self._make(row, self._table.slice(row, 1).to_pylist()[0])

    def wrong_answers(self, query: Query) -> Sequence[str]:
        if self.images is not None and query.answer_type == "open":
            return self.images.wrong_answers(query)
        return super().wrong_answers(query)

    def image_file(self, query: Query) -> Path | None:
        self.row_numbers()
        if self.images is not None:
            return self.images.image_file(query)
        return None if self._is_embedded else self._folder.path(query.image)

    def image_id(self, query: Query) -> str:
        self.row_numbers()
        if self.images is not None:
            return self.images.image_id(query)
        return f"{self.path.resolve()}:{query.image}" if self._is_embedded else super().image_id(query)

    def image_content(self, query: Query) -> Path | bytes | np.ndarray:
        self.row_numbers()
        if self.images is not None:
            return self.images.image_content(query)
        if not self._is_embedded:
            return super().image_content(query)
        try:
            return self._embedded(query.image)
        except RecordError as error:
            raise self.bad.error(f"{self.path}: record {query.id!r}: {error}") from error

    def load(self, query: Query) -> LoadedImage:
        self.row_numbers()  # nobody calls `queries` of a source that only loads another source's images
        try:
            if self.images is not None:
                image = self.images.load(query).image
            elif self._is_embedded:
                image = load_image(self._embedded(query.image), name=query.image)
            else:
                image = self._folder.load(query.image)
            return with_regions(query, image)
        except (RecordError, ImageError) as error:
            raise self.bad.error(f"{self.path}: record {query.id!r}: {error}") from error

    def _embedded(self, name: str) -> bytes:
        """The encoded bytes of an embedded image; the last row group stays in memory."""
        row = int(name.removeprefix(ROW))
        group = bisect_right(self._ends, row)
        if self._cached is None or self._cached[0] != group:
            file, number = self._groups[group]
            images = pq.ParquetFile(file).read_row_group(number, columns=["image.bytes"]).column("image")
            self._cached = group, images.combine_chunks().flatten()[0]
        content = self._cached[1][row - (self._ends[group - 1] if group else 0)].as_py()
        if not content:
            raise RecordError(f"{name} holds no image bytes")
        return bytes(content)


def schema_of(file: Path) -> pa.Schema:
    """The schema of a Parquet file.

    Raises:
        DataError: the file is not a Parquet file.
    """
    try:
        return pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: not a Parquet file: {first_line(error)}") from error


def _without_nulls(region: Any) -> Any:
    """A region without a mask that Parquet filled with nulls."""
    mask = region.get("mask") if isinstance(region, Mapping) else None
    if mask is not None and all(value is None for value in mask.values()):
        return {**region, "mask": None}
    return region
