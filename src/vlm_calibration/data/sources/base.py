"""What every source of queries offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from vlm_calibration.records import LoadedImage, Query


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

    def has_evidence(self, query: Query) -> bool:
        """Whether the object that the query is about is in its image, told without opening the image."""
        return any(query.is_evidence(r.label) for r in query.regions)
