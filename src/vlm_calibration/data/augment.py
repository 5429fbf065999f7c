"""The user's augmentations of training images, by albumentations; regions move with the pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import numpy as np
from albumentations import BasicTransform, Compose

from vlm_calibration.records import DataError, LoadedImage

__all__ = ["Augmentation", "BasicTransform"]


class Augmentation:
    """Applies albumentations transforms to an image and its regions, in their order."""

    def __init__(self, transforms: Sequence[BasicTransform]) -> None:
        self.transforms = list(transforms)
        self._compose = Compose(self.transforms)

    def __call__(self, loaded: LoadedImage, seed: int) -> LoadedImage:
        """Augment an image, with a seed in [0, 2**32); one that would lose evidence, e.g. by cropping, stays as it is.

        A DataError if the result is not a uint8 image of three channels.
        """
        regions = [*loaded.evidence, *loaded.distractors]
        self._compose.set_random_seed(seed)
        # Without regions albumentations must not be given an empty list.
        targets = {"masks": [mask.astype(np.uint8) for mask in regions]} if regions else {}
        result = self._compose(image=loaded.image, **targets)
        image, masks = result["image"], [np.asarray(m, dtype=bool) for m in result.get("masks", ())]
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,)):
            names = ", ".join(type(transform).__name__ for transform in self.transforms)
            raise DataError(
                f"data.augment: {names} must leave uint8 images of shape (height, width, 3), found {image.dtype} {image.shape}: leave "
                "out conversions, the model's processor makes them"
            )
        evidence = tuple(masks[: len(loaded.evidence)])
        if not all(mask.any() for mask in evidence):
            return loaded
        distractors = tuple(mask for mask in masks[len(loaded.evidence) :] if mask.any())
        return loaded._replace(image=np.ascontiguousarray(image), evidence=evidence, distractors=distractors)
