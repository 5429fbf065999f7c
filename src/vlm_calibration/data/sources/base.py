"""What every source of queries offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, overload

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from vlm_calibration.perturbation.rle import leaves_image, region_to_mask
from vlm_calibration.records import DataError, LoadedImage, Query
from vlm_calibration.text.grading import grade
from vlm_calibration.text.labels import answer_is_no, is_evidence

OnBadRecord = Literal["raise", "skip"]
Presence = Literal["present", "absent", "unlocated"]
"""Of what a query is about. present: a region shows it; absent: there is none, and the answer is no; unlocated: there is none
although the answer does not say that it is absent."""
MAX_NAMED = 5


def opposite(query: Query) -> tuple[str, ...]:
    """The other answer to a yes/no question; nothing for other questions."""
    if query.answer_type != "yes_no":
        return ()
    return ("No",) if grade("Yes", query.answer, "yes_no", ()).correct else ("Yes",)


def with_regions(query: Query, image: np.ndarray) -> LoadedImage:
    """An image, uint8 [H, W, 3], with the masks of its query's regions; what of a box lies outside the image is cut off.

    Raises:
        RecordError: a mask was made for another image size, or a region lies outside the image.
    """
    height, width = image.shape[:2]
    masks = [(is_evidence(query, r.label), region_to_mask(r, height, width)) for r in query.regions]
    return LoadedImage(
        image,
        tuple(m for shown, m in masks if shown),
        tuple(m for shown, m in masks if not shown),
        any(leaves_image(r, height, width) for r in query.regions),
    )


def first_of(ids: Sequence[str]) -> str:
    """The first few of these ids, for a message."""
    return ", ".join([*map(repr, ids[:MAX_NAMED]), *(["..."] if len(ids) > MAX_NAMED else [])])


class BadRecords:
    """What is wrong with the records of a source that cannot be used.

    Args:
        policy: "raise" stops at the first one, "skip" collects them.
    """

    def __init__(self, policy: OnBadRecord) -> None:
        self.policy = policy
        self.messages: list[str] = []

    def add(self, message: str, cause: Exception | None = None) -> None:
        """Note a record that is left out.

        Raises:
            DataError: under "raise".
        """
        if self.policy == "raise":
            raise self.error(message) from cause
        self.messages.append(message)

    def error(self, message: str) -> DataError:
        """What to raise of a record; with advice, unless such records are left out already."""
        advice = "; `on_bad_record: skip` leaves such records out"
        return DataError(message + (advice if self.policy == "raise" else ""))

    def report(self, kept: int) -> None:
        """Warn of those that were left out; `kept` others were not."""
        if self.messages:
            shown = "; ".join(self.messages[:MAX_NAMED])
            rank_zero_warn(f"left out {len(self.messages)} of {len(self.messages) + kept} records: {shown}")


class LazyQueries(Sequence[Query]):
    """Queries that are made when they are asked for, so that a million of them take no memory.

    Args:
        length: how many there are. make: the query at an index from 0 to `length` - 1.
    """

    def __init__(self, length: int, make: Callable[[int], Query]) -> None:
        self._length = length
        self._make = make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Query: ...
    @overload
    def __getitem__(self, index: slice) -> list[Query]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._length))]
        return self._make(range(self._length)[index])

    def __iter__(self) -> Iterator[Query]:
        return map(self._make, range(self._length))


class QuerySource(ABC):
    """Queries, and the pixels and regions behind each.

    A source is made from plain settings, is cheap to pickle (it travels to worker processes), and does no work before
    `queries` is called.

    Attributes:
        on_bad_record: "raise" stops the run at a record that cannot be used, also at one that cannot be loaded; "skip" leaves
            such records out.
    """

    on_bad_record: OnBadRecord = "raise"

    @abstractmethod
    def queries(self) -> Sequence[Query]:
        """All queries, in the same order on every call, ids unique.

        Raises:
            DataError: a record or file cannot be used; the message names it.
        """

    @abstractmethod
    def load(self, query: Query) -> LoadedImage:
        """The image and the region masks of one of `queries`.

        Raises:
            DataError: the image or a region of it cannot be used; the message names it.
        """

    def wrong_answers(self, query: Query) -> Sequence[str]:
        """Answers that a model might give by mistake, none where the source knows none.

        The opposite of yes or no; for a short answer, what else is labelled in the image.
        """
        if query.answer_type != "short":
            return opposite(query)
        labels = dict.fromkeys(r.label for r in query.regions if not is_evidence(query, r.label))
        return [
            label
            for label in labels
            if label.strip() and not grade(label, query.answer, "short", query.synonyms).correct
        ]

    def has_evidence(self, query: Query) -> bool:
        """Whether a region shows what the query is about, told without opening the image."""
        return any(is_evidence(query, r.label) for r in query.regions)

    def presence(self, query: Query) -> Presence:
        """What is known of the object that the query is about. Only the answer says that it is absent, never a missing region."""
        if self.has_evidence(query):
            return "present"
        return "absent" if answer_is_no(query) else "unlocated"
