"""Image files below a data root, and COCO images that another file names and that are left out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from vlm_calibration.files import first_line
from vlm_calibration.perturbation.images import load_image
from vlm_calibration.records import DataError, RecordError

_real_path = lru_cache(maxsize=64)(os.path.realpath)
_NUMBER = re.compile(r"(?<!\d)\d{12}(?!\d)")
"""The number of an image of COCO, the same in all of its releases."""


class ImageFolder:
    """A folder of images; refuses paths that leave it, also by a symbolic link."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """The path of an image; a RecordError if it leaves the folder."""
        # Resolve links, so that the opened file really is below the root.
        root = str(_real_path(self.root))
        resolved = os.path.realpath(os.path.join(root, name))
        if os.path.commonpath([root, resolved]) != root:
            raise RecordError(f"the image path {name!r} leaves the data root {self.root}")
        return Path(resolved)

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
