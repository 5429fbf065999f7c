"""Sources for data sets that are published as JSON files of questions and a folder of images.

The files are read value by value. What a query needs stays in memory as an Arrow table, about as many bytes as the texts have
characters; everything else in the files goes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from vlm_calibration.data.sources.base import (
    BadRecords,
    LazyQueries,
    OnBadRecord,
    QuerySource,
    with_regions,
)
from vlm_calibration.data.sources.images import ImageChecks, ImageFolder
from vlm_calibration.data.sources.shares import ImageShare
from vlm_calibration.perturbation.images import ImageError
from vlm_calibration.records import DataError, LoadedImage, Query, RecordError, query_from_dict
from vlm_calibration.text.labels import check_answer

_TEXT = pa.string()
COLUMNS = {
    "id": _TEXT,
    "image": pa.dictionary(pa.int32(), _TEXT),
    "question": _TEXT,
    "answer": pa.dictionary(pa.int32(), _TEXT),
    "answer_type": pa.dictionary(pa.int32(), _TEXT),
    "category": pa.dictionary(pa.int32(), _TEXT),
    "synonyms": pa.list_(_TEXT),
}
"""Columns of the table that are fields of a query."""
ROWS = 50_000
"""Rows that are gathered before they are turned into a part of the table."""


class PublishedSource(QuerySource):
    """Base class of these sources.

    Args:
        path: the file of questions, or a folder of them.
        root: folder that image names are relative to.
        begin: use the images from this share on, in [0, 1]; see `ImageShare`.
        end: use the images up to this share, in [0, 1].
        on_bad_record: as in `QuerySource`.
    """

    columns: ClassVar[Mapping[str, pa.DataType]] = COLUMNS
    """Columns of the table: those of `COLUMNS`, and others that the source reads itself."""

    def __init__(self, path: str, root: str, begin: float, end: float, on_bad_record: OnBadRecord) -> None:
        self.path = Path(path)
        self.root = Path(root)
        self.begin, self.end = begin, end
        self.on_bad_record = on_bad_record
        self.images = ImageFolder(self.root)
        self.bad = BadRecords(on_bad_record)
        self._share = ImageShare(begin, end)
        self._opened: pa.Table | None = None

    @abstractmethod
    def _rows(self) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
        """The place of each question in its file, for messages, and its row of the table or what is wrong with it."""

    def _prepare(self, table: pa.Table) -> None:
        """Called once, with the table of all usable questions."""

    @property
    def _table(self) -> pa.Table:
        if self._opened is None:
            self._opened = self._read_table()
            self._prepare(self._opened)
        return self._opened

    def _read_table(self) -> pa.Table:
        self.bad = BadRecords(self.on_bad_record)
        checks, ids, usable = ImageChecks(self.images), set[str](), 0
        schema = pa.schema(list(self.columns.items()))
        rows: list[dict[str, Any]] = []
        parts = [schema.empty_table()]
        for where, row in self._rows():
            try:
                if isinstance(row, RecordError):
                    raise row
                self._check(row, checks, ids)
            except RecordError as error:
                self.bad.add(f"{where}: {error}", error)
                continue
            usable += 1
            if row["image"] in self._share:
                rows.append(row)
            if len(rows) == ROWS:
                parts.append(pa.Table.from_pylist(rows, schema=schema))
                rows.clear()
        parts.append(pa.Table.from_pylist(rows, schema=schema))
        self.bad.report(usable)
        if not usable:
            raise DataError(f"{self.path}: no usable question")
        table = pa.concat_tables(parts).unify_dictionaries().combine_chunks()
        if not table.num_rows:
            raise self._share.nothing_left(self.path, usable)
        return table

    def _check(self, row: Mapping[str, Any], checks: ImageChecks, ids: set[str]) -> None:
        query = query_from_dict({name: row[name] for name in COLUMNS})
        try:
            check_answer(query)
            checks.check(query.image)
            if query.id in ids:
                raise RecordError("an earlier question has the same id")
        except RecordError as error:
            raise RecordError(f"question {query.id!r}: {error}") from error
        ids.add(query.id)

    def queries(self) -> Sequence[Query]:
        return LazyQueries(self._table.num_rows, self._query)

    def _query(self, index: int) -> Query:
        [row] = self._table.slice(index, 1).to_pylist()
        return self._make(row)

    def _make(self, row: Mapping[str, Any]) -> Query:
        """The query of a row that was checked."""
        return query_from_dict({name: row[name] for name in COLUMNS})

    def image_file(self, query: Query) -> Path:
        """The file of a query's image, links resolved."""
        return self.images.path(query.image)

    def load(self, query: Query) -> LoadedImage:
        try:
            return with_regions(query, self.images.load(query.image))
        except (RecordError, ImageError) as error:
            raise self.bad.error(f"{self.path}: record {query.id!r}: {error}") from error
