"""The checks of a file's records beyond their own fields: the answer can be graded, the image exists, no id occurs twice."""

from __future__ import annotations

from vlm_calibration.data.sources.images import ImageFolder
from vlm_calibration.records import Query, RecordError
from vlm_calibration.text.labels import check_answer

MAX_KNOWN = 100_000
"""Number of image names and of answers that are remembered as good."""


class RecordChecks:
    """Checks the records of one file, in their order.

    Args:
        images: the folder of the images.
        place: where a record is, followed by its number: "on line", "in row".
    """

    def __init__(self, images: ImageFolder, place: str) -> None:
        self._images = images
        self._place = place
        self._first: dict[str, int] = {}
        self._answers: set[tuple[str, str]] = set()
        self._existing: set[str] = set()

    def check(self, query: Query, number: int, has_file: bool = True) -> None:
        """Check a record.

        Args:
            query: of the record.
            number: of its line or row.
            has_file: whether its image is a file.

        Raises:
            RecordError: the answer cannot be graded, there is no such image below the folder, or an earlier record has the same id.
        """
        answer = query.answer, query.answer_type
        if answer not in self._answers:
            check_answer(query)
            if len(self._answers) < MAX_KNOWN:
                self._answers.add(answer)
        if has_file and query.image not in self._existing:
            try:
                self._images.check(query.image)
            except RecordError as error:
                raise RecordError(f"record {query.id!r}: {error}") from error
            if len(self._existing) < MAX_KNOWN:
                self._existing.add(query.image)
        if query.id in self._first:
            raise RecordError(f"duplicate id {query.id!r}, first seen {self._place} {self._first[query.id]}")
        self._first[query.id] = number
