"""Source for Parquet files: the output of `vlm-calibration predict`, and large data of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_calibration.data.sources.base import OnBadRecord, QuerySource
from vlm_calibration.data.sources.jsonl import JsonlSource, query_from_json
from vlm_calibration.files import first_line
from vlm_calibration.progress import track
from vlm_calibration.records import DataError, Query

_TEXT = pa.string()
_MASK = pa.struct({"size": pa.list_(pa.int64()), "counts": _TEXT})
REGION = pa.struct({"label": _TEXT, "box": pa.list_(pa.float64()), "mask": _MASK, "score": pa.float64()})
REQUIRED = dict.fromkeys(("id", "image", "question", "answer", "answer_type"), _TEXT)
_TEXTS = pa.list_(_TEXT)
OPTIONAL = {"objects": _TEXTS, "regions": pa.list_(REGION), "category": _TEXT}
OPTIONAL |= dict.fromkeys(("synonyms", "absent", "wrong_answers"), _TEXTS)
NOTES = ("outcome", "rejected", "note")  # columns with the outcome of `predict`; not part of a query
ROW = "row-"  # prefix of the name of an embedded image: "row-17"


class ParquetSource(JsonlSource):
    """One query a row, whose columns are the keys of a query; read as if the rows were lines of JSON.

    Args:
        path: the Parquet file.
        root: folder that image paths are relative to; by default the folder of `path`. No path may lead out of it; a link in it may.
        images: the source that loads the images, e.g. the one that regions were extracted from; the column `image` holds its
            image names. None: images are files or embedded ({bytes, path}).
        on_bad_record: "raise" stops at the first invalid record; "skip" leaves such records out, with a warning.
    """

    place, where = "in row", "{path}: row {number}"

    def __init__(
        self,
        path: str,
        root: str | None = None,
        images: QuerySource | None = None,
        on_bad_record: OnBadRecord = "raise",
    ) -> None:
        super().__init__(path, root, on_bad_record)
        self.images = images
        self._json = bytearray()  # of all rows
        self._row_group: tuple[int, Any] = (0, ())  # the first row of a row group, and its embedded images

    @cached_property
    def _is_embedded(self) -> bool:
        image = schema_of(self.path).field("image").type
        return bool(pa.types.is_struct(image) and image.get_field_index("bytes") >= 0)

    def _read(self, indices: Iterable[int]) -> Iterator[Query]:
        for i in indices:
            yield query_from_json(self._json[self._begins[i] : self._ends[i]])

    def records(self) -> Iterator[tuple[int, int, bytes]]:
        names = schema_of(self.path).names
        known = {**REQUIRED, **OPTIONAL}
        if unknown := [name for name in names if name not in known and name not in NOTES]:
            raise DataError(f"{self.path}: unknown column {unknown[0]!r}; there are {', '.join(known)}")
        if missing := [name for name in REQUIRED if name not in names]:
            raise DataError(f"{self.path}: no column {missing[0]!r}")
        columns = [n for n in names if n in known and not (n == "image" and self._is_embedded)]
        try:
            file = pq.ParquetFile(self.path, pre_buffer=False)
            rows = (row for batch in file.iter_batches(1000, columns=columns) for row in batch.to_pylist())
            total, content = file.metadata.num_rows, bytearray()
            for number, row in enumerate(track(rows, f"checking {self.path}", total, "records")):
                if self._is_embedded:
                    row["image"] = f"{ROW}{number}"
                row = {name: value for name, value in row.items() if value is not None or name in REQUIRED}
                text = json.dumps(row, default=_as_text, ensure_ascii=False, separators=(",", ":"))
                record = text.encode(errors="surrogatepass")
                yield number, len(content), record
                content += record
            self._json = content
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.path}: cannot be read: {first_line(error)}") from error

    def wrong_answers(self, query: Query) -> Sequence[str]:
        if self.images is not None and query.answer_type == "open":
            return self.images.wrong_answers(query)
        return super().wrong_answers(query)

    @property
    def has_image_files(self) -> bool:  # type: ignore[override]
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
        return self._embedded(query) if self._is_embedded else super().image_content(query)

    @cached_property
    def _ends_of_groups(self) -> np.ndarray:
        """The first row behind each row group."""
        metadata = pq.read_metadata(self.path)
        return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])

    def _embedded(self, query: Query) -> bytes:
        """The bytes of an embedded image; the last row group stays in memory."""
        row = int(query.image.removeprefix(ROW))
        begin, images = self._row_group
        if not begin <= row < begin + len(images):
            group = int(np.searchsorted(self._ends_of_groups, row, side="right"))
            column = pq.ParquetFile(self.path).read_row_group(group, columns=["image.bytes"]).column("image")
            images = column.combine_chunks().flatten()[0]
            begin = int(self._ends_of_groups[group]) - len(images)
            self._row_group = begin, images
        if not (content := images[row - begin].as_py()):
            raise self.bad.error(f"{self.path}: record {query.id!r}: {query.image} holds no image bytes")
        return bytes(content)


def _as_text(value: Any) -> Any:
    """Bytes as text, such as a mask's counts; any other value that JSON lacks as an object, which no key of a query takes."""
    try:
        return value.decode()
    except (AttributeError, UnicodeDecodeError):
        return {"value": repr(value)}


def schema_of(file: Path) -> pa.Schema:
    """The schema of a Parquet file; any other file is a DataError."""
    try:
        return pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: not a Parquet file: {first_line(error)}") from error
