"""The interface of a source of queries, and what several sources share: bad records, lazy queries, region masks."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm_calibration.files import MAX_NAMED, first_line
from vlm_calibration.perturbation.images import load_image
from vlm_calibration.perturbation.masks import leaves_image, region_to_mask
from vlm_calibration.progress import track
from vlm_calibration.records import DataError, LoadedImage, Query, RecordError
from vlm_calibration.settings import digest, file_digest
from vlm_calibration.text.grading import grade
from vlm_calibration.text.labels import denies_existence, is_evidence, unlocated_objects

OnBadRecord = Literal["raise", "skip"]
Presence = Literal["present", "absent", "unlocated"]
"""Presence of a query's key objects. present: each has a region, but for those that are absent; absent: the only one is not in the
image, and no region shows it; unlocated: one has no region, although nothing says that it is absent."""


def opposite(query: Query) -> tuple[str, ...]:
    """The opposite answer to a yes/no question; empty for other questions."""
    if query.answer_type != "yes_no":
        return ()
    return ("No",) if grade("Yes", query.answer, "yes_no", ()).correct else ("Yes",)


def with_masks(query: Query, image: np.ndarray, masks: Iterable[tuple[str, np.ndarray]]) -> LoadedImage:
    """An image with the masks of its objects, given by the names of these."""
    named = [(is_evidence(query, name), mask) for name, mask in masks]
    evidence, distractors = (tuple(m for is_key, m in named if is_key == kind) for kind in (True, False))
    return LoadedImage(image, evidence, distractors)


def with_regions(query: Query, image: np.ndarray) -> LoadedImage:
    """Add the masks of a query's regions, clipped to the image; a RecordError for one outside it or a mask of another size."""
    height, width = image.shape[:2]
    loaded = with_masks(query, image, ((r.label, region_to_mask(r, height, width)) for r in query.regions))
    return loaded._replace(clipped=any(leaves_image(r, height, width) for r in query.regions))


class BadRecords:
    """The messages about a source's invalid records, one each; under the policy "raise" the first is raised."""

    def __init__(self, policy: OnBadRecord) -> None:
        self.policy = policy
        self.messages: list[str] = []

    def add(self, message: str, cause: Exception | None = None) -> None:
        """Skip a record, or raise a DataError."""
        if self.policy == "raise":
            raise self.error(message) from cause
        self.messages.append(message)

    def error(self, message: str) -> DataError:
        advice = "; `on_bad_record: skip` leaves such records out" if self.policy == "raise" else ""
        return DataError(message + advice)

    def report(self, usable: int) -> None:
        """Warn about the skipped records, given the number of those that were not skipped."""
        if self.messages:
            # Not above: it imports torch, which `data split` does not need.
            from lightning.pytorch.utilities import rank_zero_warn

            first = "; ".join(self.messages[:MAX_NAMED])
            rank_zero_warn(f"left out {len(self.messages)} of {len(self.messages) + usable} records: {first}")


class LazyQueries(Sequence[Query]):
    """A sequence of `length` queries; `read` makes those at a range of indices on access."""

    def __init__(self, length: int, read: Callable[[range], Iterator[Query]]) -> None:
        self._indices = range(length)
        self._read = read

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._indices[index]
        if isinstance(chosen, range):
            return list(self._read(chosen))
        [query] = self._read(range(chosen, chosen + 1))
        return query

    def __iter__(self) -> Iterator[Query]:
        return self._read(self._indices)


class QuerySource(ABC):
    """Base class of sources: queries, with the image and regions of each.

    A source is built from plain settings, cheap to pickle (data workers get a copy), and idle until `queries` is called.

    Attributes:
        on_bad_record: "raise" stops the run at an invalid record or at an image that cannot be loaded; "skip" leaves such
            records out.
        annotates_all: whether all objects of an image have regions of one kind, whatever the question and its answer. Otherwise the
            region of an absent object gets the shape of a present one's: a shape that only one answer has would tell which it is.
    """

    on_bad_record: OnBadRecord = "raise"
    annotates_all = False

    @abstractmethod
    def queries(self) -> Sequence[Query]:
        """All queries, in the same order on every call, ids unique; a DataError names an invalid file or record."""

    def scan(self, name: str) -> Iterator[Query]:
        """The same in one pass, with its progress under a name; a file that was not read before is checked in this pass."""
        queries = self.queries()
        return track(queries, name, len(queries), "queries")

    @abstractmethod
    def load(self, query: Query) -> LoadedImage:
        """The image and region masks of one of `queries`; a DataError names an invalid image or region."""

    def image_file(self, query: Query) -> Path | None:
        """The file of a query's image, links resolved; None if the source has no file of it."""
        return None

    def image_id(self, query: Query) -> str:
        """A text that is the same for two queries, of this or another source, if their images are stored in one place."""
        file = self.image_file(query)
        return query.image if file is None else str(file)

    def image_content(self, query: Query) -> Path | bytes | np.ndarray:
        """The image without its regions: its file, which is not opened, its encoded bytes, or else its pixels, uint8 [H, W, 3]."""
        file = self.image_file(query)
        return self.load(query).image if file is None else file

    def image_digest(self, query: Query) -> str:
        """A text that differs between images, and not between copies of one image, which is read and not decoded."""
        content = self.image_content(query)
        if not isinstance(content, Path):
            return digest([content if isinstance(content, bytes) else content.tobytes()])
        try:
            return file_digest(content)
        except OSError as error:
            raise DataError(f"record {query.id!r}: {content}: {error.strerror}") from error

    def content_digest(self, query: Query) -> int:
        """The digest of what a model is asked, in [0, 2^64): question, answer type and image."""
        return int(digest([query.question, "\0", query.answer_type, "\0", self.image_digest(query)])[:16], 16)

    def wrong_answers(self, query: Query) -> Sequence[str]:
        """Plausible wrong answers, possibly none: those of the record, the opposite of yes or no, or labels of other objects."""
        if query.wrong_answers is not None:
            return query.wrong_answers
        if query.answer_type != "short":
            return opposite(query)
        names = dict.fromkeys(r.label for r in query.regions if not is_evidence(query, r.label))
        return [n for n in names if n.strip() and not grade(n, query.answer, "short", query.synonyms).correct]

    def labels(self, query: Query) -> Sequence[str]:
        """The labels of the image's regions; does not open the image."""
        return [r.label for r in query.regions]

    def has_evidence(self, query: Query) -> bool:
        """Whether a region contains a key object; does not open the image."""
        return any(is_evidence(query, label) for label in self.labels(query))

    def has_distractor(self, query: Query) -> bool:
        """Whether a region contains an object that the question is not about; does not open the image."""
        return any(not is_evidence(query, label) for label in self.labels(query))

    def presence(self, query: Query) -> Presence:
        """Presence of the key objects. A missing region alone never means that one is absent."""
        labels = self.labels(query)
        if unlocated_objects(query, labels):
            return "unlocated"
        if any(is_evidence(query, label) for label in labels):
            return "present"
        return "absent" if query.absent or denies_existence(query) else "unlocated"


def queries_digest(source: QuerySource) -> str:
    """The digest of a source's queries, 32 hexadecimal digits; about 3 s for 100,000 queries, once a process."""
    if "_queries_digest" not in vars(source):
        vars(source)["_queries_digest"] = digest(map(repr, source.queries()))
    return str(vars(source)["_queries_digest"])


_NUMBER = re.compile(r"(?<!\d)\d{12}(?!\d)")
"""The number of an image of COCO, the same in all of its releases."""


class ImageFolder:
    """A folder of images, some of which may be links to others; refuses paths that leave it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """The path of an image; a RecordError if it leaves the folder."""
        root = os.path.abspath(self.root)
        path = os.path.abspath(os.path.join(root, name))
        if os.path.commonpath([root, path]) != root:
            raise RecordError(f"the image path {name!r} leaves the data root {self.root}")
        # Links are resolved, so that an image with two names is known as one.
        return Path(os.path.realpath(path))

    def check(self, name: str) -> None:
        """Raise a RecordError if there is no such image, or its path leaves the folder."""
        # Unlike Path.is_file, this accepts names that are too long.
        if not os.path.isfile(path := self.path(name)):
            raise RecordError(f"no such image: {path}")

    def load(self, name: str) -> np.ndarray:
        """Load an image, uint8 [H, W, 3]; raises a RecordError as `path`, or an ImageError."""
        return load_image(self.path(name))


def excluded_images(paths: Sequence[Path]) -> Callable[[str], bool]:
    """Whether an image's name holds a number of COCO that occurs in text files, such as POPE's question files."""
    numbers: set[str] = set()
    for path in paths:
        try:
            found = _NUMBER.findall(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            advice = "`vlm-calibration data fetch pope` gets POPE's, `exclude: null` leaves nothing out"
            raise DataError(f"{path}: `exclude`: {first_line(error)}; {advice}") from error
        if not found:
            raise DataError(f"{path}: names no image by a number of twelve digits")
        numbers.update(found)
    return lambda name: not numbers.isdisjoint(_NUMBER.findall(name))
