"""Shares of a data set by image: training and validation from one file, with no image in both."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_calibration.records import DataError
from vlm_calibration.settings import digest


@dataclass(frozen=True)
class ImageShare:
    """The images between two shares of a data set. `image in share` says whether an image is one of them.

    An image's place is a hash of its name, so it depends neither on the order of the data nor on what else is in it: shares that do
    not overlap have no image in common, and all questions about an image are in one share. Sizes are therefore only about those
    that `begin` and `end` name.

    Args:
        begin: in [0, 1].
        end: in [0, 1], exclusive unless it is 1.

    Raises:
        DataError: not 0 <= begin < end <= 1.
    """

    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise DataError(f"begin and end: needs 0 <= begin < end <= 1, found {self.begin} and {self.end}")

    @property
    def is_all(self) -> bool:
        """Whether every image is in the share."""
        return (self.begin, self.end) == (0, 1)

    def __contains__(self, image: str | bytes) -> bool:
        if self.is_all:
            return True
        return self.begin <= int(digest([image]), 16) / 16**32 < self.end

    def nothing_left(self, where: object, total: int) -> DataError:
        """The error to raise if none of `total` usable queries is in the share; `where` names the file."""
        return DataError(
            f"{where}: none of its {total} queries is about an image between the shares {self.begin:g} and {self.end:g}: move "
            "begin and end, or use more data"
        )
