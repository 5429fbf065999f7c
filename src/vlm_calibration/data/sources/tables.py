"""Parquet files as one table with one query a row, and access to the images embedded in them.

Text columns stay in memory as Arrow arrays, about one byte a character. Images do not: Parquet is read in row groups of many
images, so the last group is cached, and images can be unpacked into a folder, which makes random access cheap from the second
read of a group on.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
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
from vlm_calibration.data.sources.data_root import MissingFileError
from vlm_calibration.files import first_line, replacing
from vlm_calibration.perturbation.images import ImageError, load_image
from vlm_calibration.records import DataError, LoadedImage, Query, RecordError
from vlm_calibration.settings import digest

ROW = "row-"
"""Prefix of the name of an embedded image: "row-17"."""


def parquet_files(path: Path) -> list[Path]:
    """The file itself, or the *.parquet files of a folder in the order of their names.

    Raises:
        DataError: there is no such file.
    """
    if not path.exists():
        raise MissingFileError(path)
    files = sorted(f for f in path.glob("*.parquet") if f.is_file()) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: cannot read the queries: no *.parquet file in this folder")
    return files


def schema_of(files: Sequence[Path]) -> pa.Schema:
    """The schema of the first file.

    Raises:
        DataError: the file is not a Parquet file.
    """
    try:
        return pq.read_schema(files[0])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{files[0]}: not a Parquet file: {first_line(error)}") from error


def read_columns(files: Sequence[Path], columns: Sequence[str], repeating: Sequence[str] = ()) -> pa.Table:
    """Read columns of all files into one table.

    Args:
        files: concatenated in this order.
        columns: names of the columns.
        repeating: text columns with repeating values, which are read as dictionaries.

    Raises:
        DataError: a file cannot be read, or differs from the first file in its columns.
    """
    parts = []
    for file in files:
        try:
            parts.append(pq.read_table(file, columns=list(columns), read_dictionary=list(repeating)))
            parts[-1] = parts[-1].cast(parts[0].schema) if len(parts) > 1 else parts[0]
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise DataError(
                f"{file}: cannot read the columns {', '.join(columns)}: {first_line(error)}"
            ) from error
    return pa.concat_tables(parts).unify_dictionaries()


def is_embedded(kind: pa.DataType) -> bool:
    """Whether a column type is {bytes, path}, the type of images in Hugging Face data sets."""
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


class EmbeddedImages:
    """Random access to the images in a column of Parquet files.

    Args:
        files: concatenated in this order.
        column: name of the column.
        unpacked: folder that the images of a row group are written to when it is first read; None: each random access reads
            a whole row group.
    """

    def __init__(self, files: Sequence[Path], column: str, unpacked: Path | None = None) -> None:
        self.files = list(files)
        self.column = column
        self.unpacked = None if unpacked is None else unpacked / _files_digest(self.files)
        self._groups: list[tuple[Path, int]] = []
        self._ends: list[int] = []
        self._cached: tuple[int, Any] | None = None

    @staticmethod
    def name(row: int) -> str:
        return f"{ROW}{row}"

    @staticmethod
    def row(name: str) -> int:
        return int(name.removeprefix(ROW))

    def load(self, name: str) -> np.ndarray:
        """Load the image `name`, uint8 [H, W, 3].

        Raises:
            RecordError: the row has no image.
            ImageError: the image cannot be read.
        """
        return load_image(self.read(name), name=name)

    def read(self, name: str) -> bytes:
        """The encoded bytes of the image `name`.

        Raises:
            RecordError: the row has no image.
        """
        row = self.row(name)
        if self.unpacked is not None and os.path.isfile(path := self.unpacked / str(row)):
            return path.read_bytes()
        self._index_groups()
        group = bisect_right(self._ends, row)
        first = self._ends[group - 1] if group else 0
        contents = self._group(group)
        if self.unpacked is not None:
            _unpack(self.unpacked, first, contents)
        content = contents[row - first].as_py()
        if not content:
            raise RecordError(f"{name} holds no image bytes")
        return bytes(content)

    def _group(self, group: int) -> Any:
        """The bytes of the images of a row group, a binary array; the last group is cached."""
        if self._cached is None or self._cached[0] != group:
            file, number = self._groups[group]
            table = pq.ParquetFile(file).read_row_group(number, columns=[f"{self.column}.bytes"])
            struct = table.column(self.column).combine_chunks()
            self._cached = group, struct.field("bytes") if struct.null_count == 0 else struct.flatten()[0]
        return self._cached[1]

    def _index_groups(self) -> None:
        """Find the last row of each row group, once."""
        if not self._ends:
            lengths = []
            for file in self.files:
                metadata = pq.read_metadata(file)
                self._groups += [(file, i) for i in range(metadata.num_row_groups)]
                lengths += [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self._ends = list(accumulate(lengths))


class TableSource(QuerySource):
    """Base class of the sources with one query a row of Parquet files, which are opened on first use.

    Args:
        path: a Parquet file, or a folder of them.
        unpacked: as in `EmbeddedImages`.
        on_bad_record: as in `QuerySource`.
    """

    _table: pa.Table
    _embedded: EmbeddedImages | None = None

    def __init__(self, path: str, unpacked: str | None, on_bad_record: OnBadRecord) -> None:
        self.path = Path(path)
        self.unpacked = None if unpacked is None else Path(unpacked)
        self.on_bad_record = on_bad_record
        self.bad = BadRecords(on_bad_record)
        self._rows: np.ndarray | None = None

    @abstractmethod
    def _open(self) -> np.ndarray:
        """Open the files, set `_table` and `_embedded`, and return the indices of the rows to use, int64."""

    @abstractmethod
    def _read(self, row: int) -> Query:
        """The query in a row; RecordError for an invalid record."""

    @abstractmethod
    def _image(self, query: Query) -> np.ndarray:
        """The image of a query, uint8 [H, W, 3]."""

    def _opened_rows(self) -> np.ndarray:
        if self._rows is None:
            self._rows = self._open()
        return self._rows

    def queries(self) -> Sequence[Query]:
        return LazyQueries(len(self._opened_rows()), self._query)

    def _query(self, index: int) -> Query:
        row = int(self._opened_rows()[index])
        try:
            return self._read(row)
        except RecordError as error:
            raise DataError(f"{self.path}: row {row}: {error}") from error

    def image_id(self, query: Query) -> str:
        self._opened_rows()
        return super().image_id(query) if self._embedded is None else f"{self.path.resolve()}:{query.image}"

    def image_content(self, query: Query) -> Path | bytes | np.ndarray:
        self._opened_rows()
        if self._embedded is None:
            return super().image_content(query)
        try:
            return self._embedded.read(query.image)
        except RecordError as error:
            raise self.bad.error(f"{self.path}: record {query.id!r}: {error}") from error

    def load(self, query: Query) -> LoadedImage:
        self._opened_rows()  # nobody calls `queries` of a source that only loads another source's images
        try:
            return with_regions(query, self._image(query))
        except (RecordError, ImageError) as error:
            raise self.bad.error(f"{self.path}: record {query.id!r}: {error}") from error


def _unpack(folder: Path, first: int, contents: Any) -> None:
    """Write each image to a file named after its row; safe with several processes."""
    for row, content in enumerate(contents, start=first):
        path = folder / str(row)
        if content.is_valid and not path.exists():
            with replacing(path, sync=False) as temporary:
                temporary.write_bytes(content.as_py())


def _files_digest(files: Sequence[Path]) -> str:
    """Digest of names, sizes and times, so that the unpacked images of other files are never used."""
    sizes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return digest([repr(sizes)])
