"""Loading images as upright 8-bit RGB, and resizing images and masks; all other code computes on uint8 [H, W, 3]."""

import io
import os
import struct

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vlm_calibration.perturbation.noise import ImageArray, check_image

DEFAULT_MAX_PIXELS = 80_000_000  # slightly below the size at which Pillow warns of decompression bombs

# EXIF orientation -> transposition that undoes it (the table of `PIL.ImageOps.exif_transpose`).
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be used."""


def load_image(
    source: str | os.PathLike[str] | bytes,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    name: str | None = None,
    least: int | None = None,
) -> ImageArray:
    """Read an image file as 8-bit RGB, uint8 [H, W, 3], contiguous and writable.

    | file | result |
    |---|---|
    | greyscale, 1 bit | three equal channels |
    | palette | its colours |
    | alpha or a transparent colour | composited on white |
    | 16-bit grey | scaled from 0..65535 to 0..255, rounded |
    | CMYK, YCbCr, HSV | converted by Pillow, without a colour profile |
    | EXIF orientation | rotated upright; unreadable EXIF is ignored |
    | several frames | the first |
    | floating point, LAB | refused |

    Args:
        source: a path, or the bytes of a file.
        max_pixels: larger images are refused by their header, before they are decoded.
        name: name of the image in messages; by default the path.
        least: read a JPEG at a half, a quarter or an eighth of its size, several times faster, if both sides keep as many pixels.

    Raises:
        ImageError: the file is missing, damaged, too large or no image, or its pixels have no unique conversion.
    """
    if name is None:
        name = f"image of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    too_large = f"more than the {max_pixels} allowed; shrink it, or raise max_pixels if you trust it"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"{name}: {image.width} x {image.height} pixels, {too_large}")
            if least is not None:
                image.draft(None, (least, least))
            image.load()
            rgb = _to_rgb(image, name)
            transposition = _transposition(image)
    except (ImageError, MemoryError):
        raise
    # Pillow's decoders raise any exception on damaged bytes, AssertionError and RuntimeError included.
    except Exception as error:
        if isinstance(error, FileNotFoundError):
            problem = "no such file; check the path and the data root"
        elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            problem = f"a decompression bomb by its size, {too_large}"
        elif isinstance(error, UnidentifiedImageError):
            problem = "not an image in a format that Pillow reads; convert or replace it"
        elif isinstance(error, OSError) and error.errno is not None:
            problem = f"cannot be opened: {error.strerror}"
        else:
            problem = f"damaged or truncated ({error}); replace the file"
        raise ImageError(f"{name}: {problem}") from error
    return np.array(rgb if transposition is None else rgb.transpose(transposition))


def resize_image(image: ImageArray, size: tuple[int, int]) -> ImageArray:
    """Resize an image, uint8 [H, W, 3], to `size = (height, width)`, bicubic with antialiasing; always a copy."""
    check_image(image)
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            problem = "32-bit pixels outside 0..65535 have no unique conversion to 8-bit"
            raise ImageError(f"{name}: {problem}; convert the file")
        # 65535 = 255 * 257, so dividing by 257 maps 0 to 0 and 65535 to 255.
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "LAB"):
        problem = f"{image.mode} pixels have no unique conversion to 8-bit RGB"
        raise ImageError(f"{name}: {problem}; convert the file to RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _transposition(image: Image.Image) -> Image.Transpose | None:
    """What undoes the EXIF orientation; None if the image is upright, or EXIF is missing or broken."""
    try:
        return _TRANSPOSITIONS.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
    except (SyntaxError, OSError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error):
        return None
