"""Image files below a data root, by the names that records give them."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from vlm_calibration.perturbation.images import load_image
from vlm_calibration.records import RecordError


class ImageFolder:
    """A folder that no image may lie outside of.

    Args:
        root: the folder; symbolic links within it count by where they lead.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """Where the image of this name is.

        Raises:
            RecordError: outside the folder.
        """
        # What is opened must really lie below the root, links included.
        root = _real(os.fspath(self.root))
        resolved = os.path.realpath(os.path.join(root, name))
        if os.path.commonpath([root, resolved]) != root:
            raise RecordError(f"the image path {name!r} leaves the data root {self.root}")
        return Path(resolved)

    def check(self, name: str) -> None:
        """Make sure that there is a file of this name.

        Raises:
            RecordError: there is none, or it lies outside the folder.
        """
        path = self.path(name)
        # Unlike Path.is_file, this takes any name, too long ones included.
        if not os.path.isfile(path):
            raise RecordError(f"no such image: {path}")

    def load(self, name: str) -> np.ndarray:
        """The image of this name, uint8 [H, W, 3].

        Raises:
            RecordError: outside the folder.
            ImageError: it cannot be read.
        """
        return load_image(self.path(name))


@lru_cache(maxsize=64)
def _real(root: str) -> str:
    return os.path.realpath(root)
