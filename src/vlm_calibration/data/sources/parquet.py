"""Source for Parquet files: the output of `vlm-calibration predict`, and large data of one's own.

The columns are the keys of a query. Images are files below a data root, are embedded in the file, or come from another source. Texts
stay in memory as Arrow arrays, about one byte a character. Embedded images do not: a row group of them is read at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_calibration.data.sources.base import OnBadRecord, QuerySource
from vlm_calibration.data.sources.query_file import QueryFile
from vlm_calibration.files import first_line
from vlm_calibration.perturbation.images import load_image
from vlm_calibration.progress import track
from vlm_calibration.records import DataError, Query, RecordError, query_from_dict

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
_TEXTS = pa.list_(_TEXT)
OPTIONAL = {
    "objects": _TEXTS,
    "regions": pa.list_(REGION),
    "category": _TEXT,
    "synonyms": _TEXTS,
    "absent": _TEXTS,
    "wrong_answers": _TEXTS,
}
NOTES = ("outcome", "rejected", "note")
"""Columns with the outcome of `predict`; not part of a query."""
ROW = "row-"
"""Prefix of the name of an embedded image: "row-17"."""
BATCH = 1000
"""Rows that are decoded at once when a file is checked."""


class ParquetSource(QueryFile):
    """One query a row. Every row is checked when `queries` is first called.

    Args:
        path: a Parquet file, or a folder of them, read in the order of their names.
        root: folder that image paths are relative to; by default the folder of `path`. No image may lie outside it.
        images: the source that loads the images, e.g. the one that regions were extracted from; the column `image` holds its
            image names. None: images are files or embedded ({bytes, path}).
        on_bad_record: "raise" stops at the first invalid record; "skip" leaves such records out, with a warning.
    """

    place = "in row"

    def __init__(
        self,
        path: str,
        root: str | None = None,
        images: QuerySource | None = None,
        on_bad_record: OnBadRecord = "raise",
    ) -> None:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        super().__init__(path, folder if root is None else Path(root), on_bad_record)
        self.images = images
        self._cached: tuple[int, Any] | None = None

    @cached_property
    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        files = sorted(file for file in self.path.glob("*.parquet") if file.is_file())
        if not files:
            raise DataError(f"{self.path}: cannot read the queries: no *.parquet file in this folder")
        return files

    @cached_property
    def _is_embedded(self) -> bool:
        image = schema_of(self._files[0]).field("image").type
        return bool(pa.types.is_struct(image) and image.get_field_index("bytes") >= 0)

    @cached_property
    def _table(self) -> pa.Table:
        """The columns of all files, without embedded images."""
        names = schema_of(self._files[0]).names
        known = {**REQUIRED, **OPTIONAL}
        if unknown := [name for name in names if name not in known and name not in NOTES]:
            raise DataError(
                f"{self.path}: unknown column {unknown[0]!r}; a query has the columns {', '.join(known)}"
            )
        if missing := [name for name in REQUIRED if name not in names]:
            raise DataError(f"{self.path}: no column {missing[0]!r}")
        columns = [n for n in names if n not in NOTES and not (n == "image" and self._is_embedded)]
        table = None
        for file in self._files:
            try:
                read = pq.read_table(file, columns=columns)
                table = (
                    read if table is None else pa.concat_tables([table, read], promote_options="permissive")
                )
            except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                raise DataError(
                    f"{file}: cannot read the columns {', '.join(columns)}: {first_line(error)}"
                ) from error
        return table

    def records(self) -> Iterator[tuple[int, int, str, Callable[[], Query]]]:
        batches = self._table.to_batches(max_chunksize=BATCH)
        rows = enumerate(record for batch in batches for record in batch.to_pylist())
        for row, record in track(rows, f"checking {self.path}", self._table.num_rows, "records"):
            yield row, row, f"{self.path}: row {row}", lambda: self._record(row, record)  # noqa: B023

    def read(self, position: int) -> Query:
        return self._record(position, self._table.slice(position, 1).to_pylist()[0])

    def _record(self, row: int, record: dict[str, Any]) -> Query:
        if self._is_embedded:
            record["image"] = f"{ROW}{row}"
        if isinstance(regions := record.get("regions"), list):
            record["regions"] = [_without_nulls(region) for region in regions]
        return query_from_dict(record)

    def wrong_answers(self, query: Query) -> Sequence[str]:
        if self.images is not None and query.answer_type == "open":
            return self.images.wrong_answers(query)
        return super().wrong_answers(query)

    @property
    def has_image_files(self) -> bool:
        return self.images is None and not self._is_embedded

    def image_file(self, query: Query) -> Path | None:
        if self.images is not None:
            return self.images.image_file(query)
        return None if self._is_embedded else super().image_file(query)

    def image_id(self, query: Query) -> str:
        if self.images is not None:
            return self.images.image_id(query)
        return f"{self.path.resolve()}:{query.image}" if self._is_embedded else super().image_id(query)

    def image_content(self, query: Query) -> Path | bytes | np.ndarray:
        if self.images is not None:
            return self.images.image_content(query)
        if not self._is_embedded:
            return super().image_content(query)
        try:
            return self._embedded(query.image)
        except RecordError as error:
            raise self.bad.error(f"{self.path}: record {query.id!r}: {error}") from error

    def image(self, query: Query) -> np.ndarray:
        if self.images is not None:
            return self.images.load(query).image
        if self._is_embedded:
            return load_image(self._embedded(query.image), name=query.image)
        return super().image(query)

    @cached_property
    def _row_groups(self) -> list[tuple[int, Path, int]]:
        """The first row, the file and the number in it of each row group."""
        groups: list[tuple[int, Path, int]] = []
        first = 0
        for file in self._files:
            metadata = pq.read_metadata(file)
            for number in range(metadata.num_row_groups):
                groups.append((first, file, number))
                first += metadata.row_group(number).num_rows
        return groups

    def _embedded(self, name: str) -> bytes:
        """The encoded bytes of an embedded image; the last row group stays in memory."""
        row = int(name.removeprefix(ROW))
        group = bisect_right(self._row_groups, row, key=lambda group: group[0]) - 1
        first, file, number = self._row_groups[group]
        if self._cached is None or self._cached[0] != group:
            images = pq.ParquetFile(file).read_row_group(number, columns=["image.bytes"]).column("image")
            self._cached = group, images.combine_chunks().flatten()[0]
        content = self._cached[1][row - first].as_py()
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
