"""What files of queries have in common: every record is checked once, then read on access, so that a million take little memory."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vlm_calibration.data.sources.base import (
    BadRecords,
    LazyQueries,
    OnBadRecord,
    QuerySource,
    with_regions,
)
from vlm_calibration.data.sources.images import ImageFolder
from vlm_calibration.files import name_some
from vlm_calibration.perturbation.images import ImageError, load_image
from vlm_calibration.records import DataError, LoadedImage, Query, RecordError
from vlm_calibration.text.labels import check_answer

SPLITS = ("train", "validation", "calibration", "test")
"""Names of the files of a data root, without their suffix; the images that they name are beside them."""
PRESETS = {".jsonl": "data/jsonl", ".parquet": "data/parquet"}
"""Suffix of the files -> the preset that reads them."""
MAX_KNOWN = 100_000
"""Number of image names and of answers that are remembered as good."""


class MissingFileError(DataError):
    """A file of queries does not exist. The message says what the folder has instead and how to make the file."""

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
    """Checks of a file's records beyond their own fields: the answer can be graded, the image exists, no id occurs twice.

    `place` is where a record is, followed by its number: "on line", "in row".
    """

    def __init__(self, images: ImageFolder, place: str) -> None:
        self._check_image = lru_cache(MAX_KNOWN)(images.check)
        self._place = place
        self._first: dict[str, int] = {}
        self._answers: set[tuple[str, str]] = set()

    def check(self, query: Query, number: int, has_file: bool = True) -> None:
        """Raise a RecordError if the record with this number, whose image may be a file, fails a check."""
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


class QueryFile(QuerySource):
    """The queries of a file, which are read at their positions in it.

    Args:
        path: the file.
        root: folder that image paths are relative to; None: that of the file. No image may lie outside it.
        on_bad_record: "raise" stops at the first invalid record; "skip" leaves such records out, with a warning.

    Attributes:
        bad: the records that were left out.
        place: where a record is, followed by its number.
        where: the same for the beginning of a message, with `path` and `number`.
    """

    place: str
    where: str

    def __init__(self, path: str, root: Path | None, on_bad_record: OnBadRecord) -> None:
        self.path = Path(path)
        self.root = root or self.path.parent
        self.on_bad_record = on_bad_record
        self.images_below = ImageFolder(self.root)
        self.bad = BadRecords(on_bad_record)
        self._positions: np.ndarray | None = None

    @abstractmethod
    def records(self) -> Iterator[tuple[int, int, Any]]:
        """Position, number and content of each record of the file."""

    @abstractmethod
    def decode(self, content: Any) -> Query:
        """The query of a record's content; a RecordError says what is wrong with it."""

    @abstractmethod
    def read(self, positions: Sequence[int]) -> Iterator[Query]:
        """The queries at positions, in order; fast if they rise."""

    @property
    def has_image_files(self) -> bool:
        """Whether images are files below `root`."""
        return True

    @property
    def positions(self) -> np.ndarray:
        """The position of each of `queries`, int64 [N]; all records are read at the first call."""
        if self._positions is None:
            deque(self._check(), maxlen=0)
        assert self._positions is not None
        return self._positions

    def scan(self, name: str) -> Iterator[Query]:
        return self._check() if self._positions is None else super().scan(name)

    def _check(self) -> Iterator[Query]:
        """The usable queries, whose positions are known once all records have been read."""
        if not self.path.exists():
            raise MissingFileError(self.path)
        self.bad = BadRecords(self.on_bad_record)
        checks = RecordChecks(self.images_below, self.place)
        has_image_files = self.has_image_files
        positions = array("q")
        for position, number, content in self.records():
            try:
                query = self.decode(content)
                checks.check(query, number, has_image_files)
            except RecordError as error:
                self.bad.add(f"{self.where.format(path=self.path, number=number)}: {error}", error)
            else:
                positions.append(position)
                yield query
        self.bad.report(len(positions))
        if not positions:
            raise DataError(f"{self.path}: no usable query in this file")
        self._positions = np.array(positions, dtype=np.int64)

    def queries(self) -> Sequence[Query]:
        return LazyQueries(len(self.positions), self._read)

    def _read(self, indices: range) -> Iterator[Query]:
        return (
            self.read(self.positions[np.asarray(indices, dtype=np.int64)].tolist()) if indices else iter(())
        )

    def image_file(self, query: Query) -> Path | None:
        return self.images_below.path(query.image)

    def load(self, query: Query) -> LoadedImage:
        try:
            content = self.image_content(query)
            pixels = content if isinstance(content, np.ndarray) else load_image(content)
            return with_regions(query, pixels)
        except (RecordError, ImageError) as error:
            raise self.bad.error(f"{self.path}: record {query.id!r}: {error}") from error
