"""Source for data sets of the library `datasets`: a saved folder, Parquet files, or a name on the Hugging Face Hub.

The library maps the data from the disk, so rows are read on access. Images are decoded here, by the decoder of all sources, and not by
the library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_calibration.data.sources.base import (
    BadRecords,
    LazyQueries,
    OnBadRecord,
    QuerySource,
    with_regions,
)
from vlm_calibration.data.sources.hugging_face_rows import DatasetRows, open_dataset, single
from vlm_calibration.data.sources.images import ImageChecks, ImageFolder
from vlm_calibration.data.sources.shares import ImageShare
from vlm_calibration.data.sources.tables import EmbeddedImages, region_without_nulls
from vlm_calibration.errors import did_you_mean
from vlm_calibration.hub import is_hub_name
from vlm_calibration.perturbation.images import ImageError
from vlm_calibration.records import (
    DataError,
    LoadedImage,
    Query,
    RecordError,
    id_text,
    query_from_dict,
    short_repr,
)
from vlm_calibration.text.conventions import (
    AnswerTypeChoice,
    combine_answers,
    infer_answer_type,
    strip_format_request,
)
from vlm_calibration.text.labels import check_answer

if TYPE_CHECKING:
    from datasets import Dataset

REQUIRED = ("question", "answer", "image")
OPTIONAL = ("id", "answer_type", "objects", "regions", "category", "synonyms", "image_id")


class HuggingFaceSource(QuerySource):
    """One query a row.

    An answer may be a text, a number, true or false, a class label, or a list of texts (see `combine_answers`). Without a column
    for them, ids are "row-POSITION" and answer types are inferred (see `infer_answer_type`). An image is embedded ({bytes, path} or
    bytes) or the path of a file, and may stand in a list of one.

    Args:
        path: a folder written by `save_to_disk`, a Parquet file or a folder of them, or the name of a data set on the Hub. Parquet
            files are converted once, in the library's cache; a Hub data set is downloaded into it.
        name: the configuration, where the data set has several.
        split: e.g. "train"; None: the only one.
        revision: branch, tag or commit of a data set on the Hub.
        columns: field -> name of its column, for fields whose column has another name. Fields: question, answer, image, and
            optionally id, answer_type, objects, regions, category, synonyms, and image_id, which says which rows show the same image.
        root: folder of images that are files; by default the folder of `path`, or the library's cache for a data set on the Hub. No
            image may lie outside it.
        answer_type: type of all answers if there is no such column, or "infer".
        begin: use the images from this share on, in [0, 1]; see `ImageShare`. Embedded images are told apart by `image_id`, or else by
            their bytes, which reads all images once.
        end: use the images up to this share, in [0, 1].
        on_bad_record: "raise" stops at the first invalid row; "skip" leaves such rows out, with a warning.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str | None = None,
        revision: str | None = None,
        columns: dict[str, str] | None = None,
        root: str | None = None,
        answer_type: AnswerTypeChoice = "infer",
        begin: float = 0.0,
        end: float = 1.0,
        on_bad_record: OnBadRecord = "raise",
    ) -> None:
        for field in columns or {}:
            if field not in REQUIRED + OPTIONAL:
                similar = did_you_mean(field, REQUIRED + OPTIONAL)
                raise DataError(
                    f"columns: unknown field {field!r}{similar}; expected {', '.join(REQUIRED + OPTIONAL)}"
                )
        self.path = path
        self.name = name
        self.split = split
        self.revision = revision
        self.columns = dict(columns or {})
        self.root = root
        self.answer_type = answer_type
        self.begin, self.end = begin, end
        self.on_bad_record = on_bad_record
        self.bad = BadRecords(on_bad_record)
        self._share = ImageShare(begin, end)
        self._opened: DatasetRows | None = None
        self._rows: np.ndarray | None = None

    @property
    def hub_dataset(self) -> str | None:
        return self.path if is_hub_name(self.path) else None

    @property
    def _data(self) -> DatasetRows:
        if self._opened is None:
            dataset, folder = open_dataset(self.path, self.name, self.split, self.revision)
            self._opened = DatasetRows(
                dataset, self._found_columns(dataset), ImageFolder(Path(self.root or folder))
            )
        return self._opened

    def _found_columns(self, dataset: Dataset) -> dict[str, str]:
        """Field -> name of its column, for the fields that the data set has."""
        there = dataset.column_names
        for field, column in self.columns.items():
            if column not in there:
                similar = did_you_mean(column, there)
                raise DataError(
                    f"{self.path}: columns.{field}: no column {column!r}{similar}; there are {', '.join(there)}"
                )
        columns = {field: self.columns.get(field, field) for field in REQUIRED + OPTIONAL}
        for field in REQUIRED:
            if columns[field] not in there:
                raise DataError(
                    f"{self.path}: no column {field!r}: name it with columns.{field}; there are {', '.join(there)}"
                )
        return {field: column for field, column in columns.items() if column in there}

    def queries(self) -> Sequence[Query]:
        if self._rows is None:
            self._rows = self._check_rows()
        return LazyQueries(len(self._rows), self._query)

    def _check_rows(self) -> np.ndarray:
        """The rows that hold a valid query about an image of the share, int64, ascending."""
        self.bad = BadRecords(self.on_bad_record)
        data, first, rows, usable = self._data, dict[str, int](), [], 0
        checks = ImageChecks(data.folder)
        images = data.image_keys() if not self._share.is_all else None
        for row, fields in enumerate(data.texts()):
            key = next(images) if images is not None else b""
            try:
                query = self._make(row, fields)
                if first.setdefault(query.id, row) != row:
                    raise RecordError(
                        f"duplicate id {query.id!r}, first seen in row {first[query.id]}; name a column of unique ids with columns.id"
                    )
                if "image" in fields:
                    checks.check(query.image)
            except RecordError as error:
                self.bad.add(f"{self.path}: row {row}: {error}", error)
                continue
            usable += 1
            if key in self._share:
                rows.append(row)
        self.bad.report(usable)
        if not usable:
            raise DataError(f"{self.path}: no usable row in this data set")
        if not rows:
            raise self._share.nothing_left(self.path, usable)
        return np.array(rows, dtype=np.int64)

    def _make(self, row: int, fields: Mapping[str, Any]) -> Query:
        """The query of a row; RecordError for one that cannot be asked or graded."""
        answer, synonyms = fields["answer"], fields.get("synonyms") or []
        if isinstance(answer, list):
            answer, others = combine_answers(answer)
            synonyms = [*synonyms, *others]
        answer = _as_text(answer)
        question, kind = fields["question"], fields.get("answer_type")
        if isinstance(answer, str) and kind is None:
            kind = infer_answer_type(answer) if self.answer_type == "infer" else self.answer_type
        query = query_from_dict(
            {
                "id": id_text(fields["id"]) if "id" in fields else f"row-{row}",
                "image": single(fields["image"]) if "image" in fields else EmbeddedImages.name(row),
                "question": strip_format_request(question) if isinstance(question, str) else question,
                "answer": answer,
                "answer_type": kind,
                "objects": fields.get("objects"),
                "regions": _regions(fields.get("regions")),
                "category": None if fields.get("category") is None else _as_text(fields["category"]),
                "synonyms": synonyms,
            }
        )
        check_answer(query)
        return query

    def _query(self, index: int) -> Query:
        assert self._rows is not None
        row = int(self._rows[index])
        return self._make(row, self._data.text(row))

    def image_file(self, query: Query) -> Path | None:
        """The file of a query's image, links resolved; None if it is embedded."""
        return self._data.file(query.image)

    def image_id(self, query: Query) -> str:
        """A text that is the same for two queries if their images are stored in one place."""
        return str(self.image_file(query) or f"{self._data.name}:{query.image}")

    def image_content(self, query: Query) -> Path | bytes:
        """The file of a query's image, which is not opened, or its encoded bytes; DataError if the row has none."""
        try:
            return self.image_file(query) or self._data.read(query.image)
        except RecordError as error:
            raise self.bad.error(f"{self.path}: record {query.id!r}: {error}") from error

    def load(self, query: Query) -> LoadedImage:
        try:
            return with_regions(query, self._data.load(query.image))
        except (RecordError, ImageError) as error:
            raise self.bad.error(f"{self.path}: record {query.id!r}: {error}") from error


def _as_text(value: Any) -> Any:
    """A number, true or false as text; any other value as it is."""
    if isinstance(value, bool):
        return "Yes" if value else "No"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else value


def _regions(value: Any) -> Any:
    """A list of regions, which `datasets` may store as an object of lists."""
    if isinstance(value, Mapping):
        lengths = {len(values) for values in value.values() if isinstance(values, list)}
        if len(lengths) != 1 or not all(isinstance(values, list) for values in value.values()):
            raise RecordError(f"'regions' must be a list of objects, found {short_repr(value)}")
        value = [dict(zip(value, values, strict=True)) for values in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        return value
    return [region_without_nulls(region) if isinstance(region, Mapping) else region for region in value]
