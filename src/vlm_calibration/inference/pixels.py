"""Conversion of images of any form to pixels."""

from __future__ import annotations

import io
import os
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from vlm_calibration.perturbation.images import DEFAULT_MAX_PIXELS, ImageError, load_image
from vlm_calibration.perturbation.noise import ImageArray, check_image
from vlm_calibration.records import DataError

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""A path, the bytes of a file, a Pillow image, or uint8 [H, W, 3]."""

_AS_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


def pixels_of(image: ImageLike, max_pixels: int = DEFAULT_MAX_PIXELS, name: str | None = None) -> ImageArray:
    """Convert an image to uint8 [H, W, 3], by the rules of `load_image`.

    Args:
        image: the image.
        max_pixels: larger files and Pillow images are refused.
        name: name of the image in messages.

    Raises:
        DataError: the image cannot be used.
        TypeError, ValueError: an array that is not uint8 [H, W, 3].
    """
    if isinstance(image, np.ndarray):
        check_image(image)
        return image
    try:
        if isinstance(image, Image.Image):
            # Encoded as a file, it is read like any other, whatever its mode and transparency.
            return load_image(_png(image, max_pixels), max_pixels=max_pixels, name=name or "image")
        return load_image(image, max_pixels=max_pixels, name=name)
    except (ImageError, OSError) as error:
        raise DataError(str(error)) from error


def _png(image: Image.Image, max_pixels: int) -> bytes:
    if image.width * image.height > max_pixels:
        raise ImageError(f"image: {image.width} x {image.height} pixels, more than the {max_pixels} allowed")
    if image.mode in ("F", "LAB"):
        raise ImageError(
            f"image: {image.mode} pixels have no unique conversion to 8-bit RGB; convert it to RGB"
        )
    upright = ImageOps.exif_transpose(image)
    file = io.BytesIO()
    (upright if upright.mode in _AS_PNG else upright.convert("RGB")).save(file, "PNG", compress_level=1)
    return file.getvalue()
