"""Image files below a data root, and COCO images that another file names and that are left out."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from vlm_calibration.perturbation.images import load_image
from vlm_calibration.records import DataError, RecordError


class ImageFolder:
    """A folder of images; refuses paths that leave it.

    Args:
        root: the folder. Symbolic links in it must also end inside.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """The path of the image `name`.

        Raises:
            RecordError: the path leaves the folder.
        """
        # Resolve links, so that the opened file really is below the root.
        root = _real_path(os.fspath(self.root))
        resolved = os.path.realpath(os.path.join(root, name))
        if os.path.commonpath([root, resolved]) != root:
            raise RecordError(f"the image path {name!r} leaves the data root {self.root}")
        return Path(resolved)

    def check(self, name: str) -> None:
        """Make sure that the image `name` exists.

        Raises:
            RecordError: there is no such file, or its path leaves the folder.
        """
        path = self.path(name)
        # Unlike Path.is_file, this accepts names that are too long.
        if not os.path.isfile(path):
            raise RecordError(f"no such image: {path}")

    def load(self, name: str) -> np.ndarray:
        """Load the image `name`, uint8 [H, W, 3].

        Raises:
            RecordError: the path leaves the folder.
            ImageError: the file cannot be read.
        """
        return load_image(self.path(name))


@lru_cache(maxsize=64)
def _real_path(root: str) -> str:
    return os.path.realpath(root)


_NUMBER = re.compile(r"(?<!\d)\d{12}(?!\d)")
"""The number of an image of COCO, the same in all of its releases."""


class ExcludedImages:
    """The images of COCO whose number occurs in text files, such as POPE's question files; supports `name in excluded`.

    Args:
        paths: the text files, possibly none.

    Raises:
        DataError: a file cannot be read, or names no image.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._numbers = {number for path in paths for number in _numbers(path)}

    def __contains__(self, name: str) -> bool:
        return not self._numbers.isdisjoint(_NUMBER.findall(name))


def _numbers(path: Path) -> set[str]:
    try:
        numbers = set(_NUMBER.findall(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot read which images to leave out: {error.strerror if isinstance(error, OSError) else error}; "
            "`vlm-calibration data fetch pope` gets POPE's files, and `exclude: null` leaves nothing out"
        ) from error
    if not numbers:
        raise DataError(f"{path}: names no image by a number of twelve digits")
    return numbers
