"""Queries in a JSONL file, with images in a folder; records are checked once and read again on access, so that they take little memory."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from vlm_calibration.data.sources.base import (
    BadRecords,
    ImageFolder,
    LazyQueries,
    OnBadRecord,
    QuerySource,
    with_regions,
)
from vlm_calibration.files import json_lines, name_some, parse_json
from vlm_calibration.perturbation.images import ImageError, load_image
from vlm_calibration.progress import track
from vlm_calibration.records import (
    DataError,
    LoadedImage,
    Query,
    RecordError,
    query_from_dict,
    query_validator,
)
from vlm_calibration.text.labels import check_answer

SPLITS = ("train", "validation", "calibration", "test")
"""Names of the files of a data root, without their suffix; the images that they name are beside them."""
PRESETS = {".jsonl": "data/jsonl", ".parquet": "data/parquet"}
"""Suffix of the files -> the preset that reads them."""
MAX_KNOWN = 100_000  # number of image names and of answers that are remembered as good


class MissingFileError(DataError):
    """A file of queries does not exist; the message says what the folder has instead and how to make the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        folder = path.parent
        parts = [f"{path}: no such file"]
        if not folder.is_dir():
            parts.append(f"there is no folder {folder} either: give the folder of your data with --data-root")
        else:
            suffixes = (*PRESETS, ".json")
            files = sorted(p.name for p in folder.iterdir() if p.suffix in suffixes and p.is_file())
            parts.append(f"{folder} has {name_some(files, len(files)) or 'no file of queries'}")
            other = next((p for p in map(path.with_suffix, PRESETS) if p.name in files), None)
            if other is not None:
                parts.append(f"read {other.name} with `--config {PRESETS[other.suffix]}`")
            elif path.stem in SPLITS:
                parts.append(f"`vlm-calibration data split FILE` makes {', '.join(SPLITS)} from one file")
        super().__init__("; ".join(parts))


class RecordChecks:
    """Checks that answers can be graded, images exist, and no id occurs twice; `place`, "on line", precedes a record's number."""

    def __init__(self, images: ImageFolder, place: str) -> None:
        self._check_image = lru_cache(MAX_KNOWN)(images.check)
        self._place = place
        self._first: dict[str, int] = {}
        self._answers: set[tuple[str, str]] = set()

    def check(self, query: Query, number: int, has_file: bool = True) -> None:
        """A RecordError if the record with this number fails a check; `has_file`: its image is a file."""
        answer = query.answer, query.answer_type
        if answer not in self._answers:
            check_answer(query)
            if len(self._answers) < MAX_KNOWN:
                self._answers.add(answer)
        if has_file:
            try:
                self._check_image(query.image)
            except RecordError as error:
                raise RecordError(f"record {query.id!r}: {error}") from error
        if query.id in self._first:
            raise RecordError(f"duplicate id {query.id!r}, first seen {self._place} {self._first[query.id]}")
        self._first[query.id] = number


class JsonlSource(QuerySource):
    """One query a line, a JSON object; blank lines are skipped.

    Args:
        path: the JSONL file.
        root: folder that image paths are relative to; by default the folder of `path`. No path may lead out of it; a link in it may.
        on_bad_record: "raise" stops at the first invalid record; "skip" leaves such records out, with a warning.

    Attributes:
        bad: the records that were left out.
        place: where a record is, before its number; `where` is the same for the beginning of a message.
        numbers: the numbers of the usable records, empty until all have been read.
        has_image_files: whether images are files below `root`.
    """

    place, where = "on line", "{path}:{number}"
    has_image_files = True

    def __init__(self, path: str, root: str | None = None, on_bad_record: OnBadRecord = "raise") -> None:
        self.path = Path(path)
        self.root = self.path.parent if root is None else Path(root)
        self.on_bad_record = on_bad_record
        self.images_below = ImageFolder(self.root)
        self.bad = BadRecords(on_bad_record)
        self.numbers = array("q")
        self._begins, self._ends = array("q"), array("q")  # of the JSON of each usable record

    def records(self) -> Iterator[tuple[int, int, bytes]]:
        """The number, the offset and the JSON of each record of the file."""
        lines, size = json_lines(self.path), self.path.stat().st_size / 1e6
        for line in track(lines, f"checking {self.path}", size, "MB", lambda line: len(line.content) / 1e6):
            if line.number == 1 and line.content.startswith(b"PAR1"):
                source = "vlm_calibration.data.sources.parquet.ParquetSource"
                raise DataError(f"{self.path}: a Parquet file, expected JSON lines: class_path: {source}")
            yield line.number, line.offset, line.content

    def scan(self, name: str) -> Iterator[Query]:
        return super().scan(name) if self.numbers else self._check()

    def _check(self) -> Iterator[Query]:
        """The usable queries, which are kept once all records have been read."""
        if not self.path.exists():
            raise MissingFileError(self.path)
        self.bad = BadRecords(self.on_bad_record)
        checks = RecordChecks(self.images_below, self.place)
        numbers, begins, ends = array("q"), array("q"), array("q")
        for number, begin, record in self.records():
            try:
                query = query_from_json(record)
                checks.check(query, number, self.has_image_files)
            except RecordError as error:
                self.bad.add(f"{self.where.format(path=self.path, number=number)}: {error}", error)
            else:
                numbers.append(number)
                begins.append(begin)
                ends.append(begin + len(record))
                yield query
        self.bad.report(len(numbers))
        if not numbers:
            raise DataError(f"{self.path}: no usable query in this file")
        self.numbers, self._begins, self._ends = numbers, begins, ends

    def queries(self) -> Sequence[Query]:
        if not self.numbers:
            deque(self._check(), maxlen=0)
        return LazyQueries(len(self.numbers), self._read)

    def _read(self, indices: Iterable[int]) -> Iterator[Query]:
        begin = 0
        try:
            with self.path.open("rb") as file:
                for i in indices:
                    begin = self._begins[i]
                    file.seek(begin)
                    yield query_from_json(file.read(self._ends[i] - begin))
        except (OSError, RecordError) as error:
            raise DataError(f"{self.path}: changed while in use, at byte {begin}: {error}") from error

    def image_file(self, query: Query) -> Path | None:
        return self.images_below.path(query.image)

    def load(self, query: Query) -> LoadedImage:
        try:
            content = self.image_content(query)
            return with_regions(query, content if isinstance(content, np.ndarray) else load_image(content))
        except (RecordError, ImageError) as error:
            raise self.bad.error(f"{self.path}: record {query.id!r}: {error}") from error


def query_from_json(content: bytes | bytearray) -> Query:
    """The query that a JSON object holds, or a RecordError."""
    try:
        return query_validator().validate_json(content)
    except ValueError:
        return query_from_dict(parse_json(content))  # says what is wrong
