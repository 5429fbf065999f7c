"""What every source of queries offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from vlm_calibration.records import LoadedImage, Query
from vlm_calibration.text.grading import grade


def opposite(query: Query) -> tuple[str, ...]:
    """The other answer to a yes/no question; nothing for other questions."""
    if query.answer_type != "yes_no":
        return ()
    return ("No",) if grade("Yes", query.answer, "yes_no", ()).correct else ("Yes",)


class QuerySource(ABC):
    """Queries, and the pixels and regions behind each.

    A source is made from plain settings, is cheap to pickle (it travels to worker processes), and does no work before
    `queries` is called.
    """

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
        labels = dict.fromkeys(r.label for r in query.regions if not query.is_evidence(r.label))
        return [
            label
            for label in labels
            if label.strip() and not grade(label, query.answer, "short", query.synonyms).correct
        ]

    def has_evidence(self, query: Query) -> bool:
        """Whether the object that the query is about is in its image, told without opening the image."""
        return any(query.is_evidence(r.label) for r in query.regions)
