"""Parquet files as one table, and the images that are embedded in them, read when they are needed.

Text columns are small and are kept in memory as Arrow arrays, about as many bytes as there are characters. Images are not: a
Parquet file can only be read by row groups of many images, so each read keeps the group at hand, and a folder of unpacked
images, filled as groups are read, makes random access cheap from the second time on.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_calibration.files import replacing
from vlm_calibration.perturbation.images import load_image
from vlm_calibration.records import DataError, RecordError
from vlm_calibration.settings import digest

ROW = "row-"
"""An embedded image goes by the name of its row: "row-17"."""


def parquet_files(path: Path) -> list[Path]:
    """The file itself, or the *.parquet files of a folder by name.

    Raises:
        DataError: there is none.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(os.path.isfile(f) for f in files):
        what = "no *.parquet file in this folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: cannot read the queries: {what}")
    return files


def schema_of(files: Sequence[Path]) -> pa.Schema:
    """The columns of the first file.

    Raises:
        DataError: it is not a Parquet file.
    """
    try:
        return pq.read_schema(files[0])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{files[0]}: not a Parquet file: {_first(error)}") from error


def read_columns(files: Sequence[Path], columns: Sequence[str], repeating: Sequence[str] = ()) -> pa.Table:
    """These columns of all files, one behind the other.

    Args:
        repeating: text columns in which values repeat, of which each value is kept once.

    Raises:
        DataError: a file cannot be read, or has other columns than the first.
    """
    parts = []
    for file in files:
        try:
            parts.append(pq.read_table(file, columns=list(columns), read_dictionary=list(repeating)))
            parts[-1] = parts[-1].cast(parts[0].schema) if len(parts) > 1 else parts[0]
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise DataError(
                f"{file}: cannot read the columns {', '.join(columns)}: {_first(error)}"
            ) from error
    return pa.concat_tables(parts).unify_dictionaries()


def is_embedded(kind: pa.DataType) -> bool:
    """Whether a column of this type holds images: {bytes, path}, as Hugging Face data sets write them."""
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


class EmbeddedImages:
    """Images in the column `column` of Parquet files, by the number of their row.

    Args:
        files: one behind the other.
        unpacked: folder that images are written to when their row group is read for the first time; None: every random
            access reads a whole row group.
    """

    def __init__(self, files: Sequence[Path], column: str, unpacked: Path | None = None) -> None:
        self.files = list(files)
        self.column = column
        self.unpacked = None if unpacked is None else unpacked / _files_digest(self.files)
        self._groups: list[tuple[Path, int]] = []
        self._ends: list[int] = []
        self._held: tuple[int, Any] | None = None

    @staticmethod
    def name(row: int) -> str:
        return f"{ROW}{row}"

    @staticmethod
    def row(name: str) -> int:
        return int(name.removeprefix(ROW))

    def load(self, name: str) -> np.ndarray:
        """The image of a row, uint8 [H, W, 3].

        Raises:
            RecordError: the row holds no image. ImageError: it cannot be read.
        """
        row = self.row(name)
        if self.unpacked is not None and os.path.isfile(place := self.unpacked / str(row)):
            return load_image(place.read_bytes(), name=name)
        self._index()
        group = bisect_right(self._ends, row)
        first = self._ends[group - 1] if group else 0
        held = self._group(group)
        if self.unpacked is not None:
            _unpack(self.unpacked, first, held)
        content = held[row - first].as_py()
        if not content:
            raise RecordError(f"{name} holds no image bytes")
        return load_image(content, name=name)

    def _group(self, group: int) -> Any:
        """The bytes of all images of a row group, a binary array."""
        if self._held is None or self._held[0] != group:
            file, number = self._groups[group]
            read = pq.ParquetFile(file).read_row_group(number, columns=[f"{self.column}.bytes"])
            struct = read.column(self.column).combine_chunks()
            self._held = group, struct.field("bytes") if struct.null_count == 0 else struct.flatten()[0]
        return self._held[1]

    def _index(self) -> None:
        """Where each row group ends."""
        if not self._ends:
            lengths = []
            for file in self.files:
                metadata = pq.read_metadata(file)
                self._groups += [(file, i) for i in range(metadata.num_row_groups)]
                lengths += [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self._ends = list(accumulate(lengths))


def _unpack(folder: Path, first: int, contents: Any) -> None:
    """Write each image to a file named by its row; several processes may do so at a time."""
    for row, content in enumerate(contents, start=first):
        place = folder / str(row)
        if content.is_valid and not place.exists():
            with replacing(place, sync=False) as temporary:
                temporary.write_bytes(content.as_py())


def _files_digest(files: Sequence[Path]) -> str:
    """Another one for other files, so that unpacked images are never those of another data set."""
    sizes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return digest([repr(sizes)])


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
