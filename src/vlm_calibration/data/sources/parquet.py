"""Source for Parquet files: the output of `vlm-calibration predict`, and large data of one's own.

The columns are the keys of a query. Images are files below a data root, are embedded in the file, or come from another source.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlm_calibration.data.sources.base import BadRecords, OnBadRecord, QuerySource
from vlm_calibration.data.sources.checks import suspects
from vlm_calibration.data.sources.images import ImageFolder
from vlm_calibration.data.sources.tables import (
    EmbeddedImages,
    TableSource,
    is_embedded,
    parquet_files,
    read_columns,
    region_without_nulls,
    schema_of,
)
from vlm_calibration.progress import track
from vlm_calibration.records import DataError, Query, RecordError, query_from_dict
from vlm_calibration.text.labels import check_answer

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
REPEATING = ("image", "answer", "answer_type", "category")
"""Columns with repeating values, read as dictionaries."""


class ParquetSource(TableSource):
    """One query a row. The columns are checked when the file is opened, and stay in memory as Arrow arrays.

    Args:
        path: a Parquet file, or a folder of them, read in the order of their names.
        root: folder that image paths are relative to; by default the folder of `path`. No image may lie outside it.
        images: the source that loads the images, e.g. the one that regions were extracted from; the column `image` holds its
            image names. None: images are files or embedded.
        unpacked: folder that embedded images are unpacked into; None: each read of an image reads a whole row group.
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
        unpacked: str | None = None,
        begin: float = 0.0,
        end: float = 1.0,
        on_bad_record: OnBadRecord = "raise",
    ) -> None:
        if not 0 <= begin < end <= 1:
            raise DataError(f"ParquetSource: needs 0 <= begin < end <= 1, found {begin} and {end}")
        super().__init__(path, unpacked, on_bad_record)
        folder = self.path if self.path.is_dir() else self.path.parent
        self.root = Path(root) if root is not None else folder
        self.images = images
        self.begin, self.end = begin, end
        self._files = ImageFolder(self.root)

    def _open(self) -> np.ndarray:
        files = parquet_files(self.path)
        schema = schema_of(files)
        self._check_columns(schema)
        columns = [n for n in schema.names if n in REQUIRED | OPTIONAL]
        if is_embedded(schema.field("image").type):
            columns.remove("image")
            self._embedded = EmbeddedImages(files, "image", self.unpacked)
        repeating = [n for n in REPEATING if n in columns and pa.types.is_string(schema.field(n).type)]
        self._table = _cast_columns(read_columns(files, columns, repeating))
        rows = self._valid_rows()
        self.bad.report(len(rows))
        part = rows[round(self.begin * len(rows)) : round(self.end * len(rows))]
        if not len(rows):
            raise DataError(f"{self.path}: no usable query in this file")
        if not len(part):
            raise DataError(
                f"{self.path}: none of its {len(rows)} queries is between the shares {self.begin:g} and {self.end:g}: move "
                "begin and end, or use more queries"
            )
        return part

    def _check_columns(self, schema: pa.Schema) -> None:
        for name in schema.names:
            if name not in REQUIRED | OPTIONAL and name not in NOTES:
                columns = ", ".join([*REQUIRED, *OPTIONAL])
                raise DataError(f"{self.path}: unknown column {name!r}; a query has the columns {columns}")
        for name, expected in REQUIRED.items():
            if name not in schema.names:
                raise DataError(f"{self.path}: no column {name!r}")
            actual = schema.field(name).type
            numbered = name == "id" and pa.types.is_integer(actual)
            if not (_is_text(actual) or numbered or (name == "image" and is_embedded(actual))):
                also = " or whole numbers" if name == "id" else ""
                raise DataError(
                    f"{self.path}: the column {name!r} must be of type {expected}{also}, found {actual}"
                )
        for name, expected in OPTIONAL.items():
            if name in schema.names and not _is_readable_as(schema.field(name).type, expected):
                actual = schema.field(name).type
                raise DataError(
                    f"{self.path}: the column {name!r} must be of type {expected}, found {actual}"
                )

    def _valid_rows(self) -> np.ndarray:
        """Indices of the rows that hold a valid query."""
        self.bad = BadRecords(self.on_bad_record)
        missing = self._missing_images()
        table = self._table
        suspect_rows = np.union1d(suspects(table), missing)
        valid = np.ones(table.num_rows, dtype=bool)
        first: dict[str, int] = {}
        if len(suspect_rows):
            first = {value: row for row, value in reversed(list(enumerate(table.column("id").to_pylist())))}
        for row in map(int, suspect_rows):
            try:
                query = self._read(row)
                check_answer(query)
                if first[query.id] != row:
                    raise RecordError(f"duplicate id {query.id!r}, first seen in row {first[query.id]}")
                if self._has_files:
                    self._check_image(query)
            except RecordError as error:
                self.bad.add(f"{self.path}: row {row}: {error}", error)
                valid[row] = False
        return np.flatnonzero(valid)

    @property
    def _has_files(self) -> bool:
        return self.images is None and self._embedded is None

    def _missing_images(self) -> np.ndarray:
        """Rows whose image is no file below the root; each name is checked once."""
        if not self._has_files:
            return np.empty(0, dtype=np.int64)
        column = self._table.column("image")
        missing = []
        names = column.unique().to_pylist()
        for name in track(names, f"checking the images of {self.path}", len(names), "images"):
            try:
                if name is not None and "\0" not in name:
                    self._files.check(name)
            except RecordError:
                missing.append(name)
        if not missing:
            return np.empty(0, np.int64)
        return np.flatnonzero([name in missing for name in column.to_pylist()])

    def _check_image(self, query: Query) -> None:
        try:
            self._files.check(query.image)
        except RecordError as error:
            raise RecordError(f"record {query.id!r}: {error}") from error

    def _read(self, row: int) -> Query:
        [record] = self._table.slice(row, 1).to_pylist()
        if self._embedded is not None:
            record["image"] = self._embedded.name(row)
        record["regions"] = [region_without_nulls(region) for region in record.get("regions") or ()]
        return query_from_dict(record)

    def wrong_answers(self, query: Query) -> Sequence[str]:
        if self.images is not None and query.answer_type == "open":
            return self.images.wrong_answers(query)
        return super().wrong_answers(query)

    def row_numbers(self) -> np.ndarray:
        """Row of each of `queries` in the file, or in the files of the folder as if they were one; int64 [N]."""
        return self._opened_rows()

    def image_file(self, query: Query) -> Path | None:
        self._opened_rows()
        if self.images is not None:
            return self.images.image_file(query)
        return self._files.path(query.image) if self._has_files else None

    def image_id(self, query: Query) -> str:
        return super().image_id(query) if self.images is None else self.images.image_id(query)

    def image_content(self, query: Query) -> Path | bytes | np.ndarray:
        return super().image_content(query) if self.images is None else self.images.image_content(query)

    def _image(self, query: Query) -> np.ndarray:
        if self.images is not None:
            return self.images.load(query).image
        return (self._embedded or self._files).load(query.image)


def _cast_columns(table: pa.Table) -> pa.Table:
    """Cast texts and lists of texts to the types in `REQUIRED` and `OPTIONAL`, and drop columns of type null."""
    for index, field in reversed(list(enumerate(table.schema))):
        expected = REQUIRED.get(field.name) or OPTIONAL[field.name]
        is_null = pa.types.is_null(field.type) or (
            field.name == "regions" and pa.types.is_null(field.type.value_type)
        )
        if is_null:
            table = table.remove_column(index)
        elif field.name != "regions" and not pa.types.is_dictionary(field.type):
            table = table.set_column(index, field.name, table.column(index).cast(expected))
    return table


def _is_text(dtype: pa.DataType) -> bool:
    inner = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    return pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner)


def _is_readable_as(actual: pa.DataType, expected: pa.DataType) -> bool:
    """Whether values of type `actual` can be read as `expected`; a column of type null always can."""
    if pa.types.is_null(actual):
        return True
    if pa.types.is_list(expected):
        return (pa.types.is_list(actual) or pa.types.is_large_list(actual)) and _is_readable_as(
            actual.value_type, expected.value_type
        )
    if pa.types.is_struct(expected):
        return pa.types.is_struct(actual) and {"label", "box"} <= {field.name for field in actual}
    return _is_text(actual)
