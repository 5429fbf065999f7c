"""Digests and perceptual hashes of images, and the search for images that are nearly the same.

The perceptual hash is pHash (Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010) with the bits of
`imagehash.phash`; that package is not required, since the function is four lines and the package brings a wavelet library.
The hash finds candidates among all pairs. Images of one scene with other small objects agree in it, so a pair counts as nearly
the same only if small copies agree as well. Found are images that were encoded again, resized or slightly brightened; not
found are crops, mirrored images and grey copies of coloured images.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dct
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vlm_calibration.perturbation.images import ImageError, load_reduced
from vlm_calibration.progress import track
from vlm_calibration.records import DataError
from vlm_calibration.settings import digest

SIDE = 128
"""Least side of a reduced image that hash and small copy are computed from, in pixels."""
DCT_SIDE, FREQUENCIES = 32, 8
"""Sides of the image that is transformed, and of the block of its lowest frequencies, whose bits make the hash."""
COPY_SIDE = 24
"""Side of the small copy."""
MAX_BITS = 6
"""Bits of 64 by which the hashes of nearly equal images may differ."""
MIN_CORRELATION = 0.97
"""Least correlation of small copies, in [-1, 1]. Tells apart pages of text, whose hashes often agree."""
MAX_MEAN, MAX_PIXEL = 10.0, 64
"""Largest mean and largest single difference of small copies, of 255. Tell apart scenes with one background."""

Content = Path | bytes | np.ndarray


class ImageHash(NamedTuple):
    """What an image is recognized by.

    Attributes:
        digest: of the file's bytes, or of the pixels of an image that is not stored.
        bits: the perceptual hash, uint64.
        copy: uint8 [24, 24, 3].
    """

    digest: str
    bits: np.uint64
    copy: np.ndarray


def perceptual_hash(image: np.ndarray) -> np.uint64:
    """The 64 bits of pHash: whether each of the 8 x 8 lowest frequencies is above their median.

    Args:
        image: uint8 [H, W, 3].
    """
    grey = Image.fromarray(image).convert("L").resize((DCT_SIDE, DCT_SIDE), Image.Resampling.LANCZOS)
    low = dct(dct(np.asarray(grey, dtype=np.float64), axis=0), axis=1)[:FREQUENCIES, :FREQUENCIES]
    return np.packbits(low > np.median(low)).view(">u8")[0].astype(np.uint64)


def hash_image(content: Content) -> ImageHash:
    """Hash an image: a file, the bytes of one, or pixels, uint8 [H, W, 3].

    Raises:
        ImageError: the image cannot be read.
    """
    if isinstance(content, np.ndarray):
        encoded, image = content.tobytes(), content
    else:
        try:
            encoded = content.read_bytes() if isinstance(content, Path) else content
        except OSError as error:
            raise ImageError(f"{content!s}: cannot be opened: {error.strerror}") from error
        image = load_reduced(encoded, SIDE)
    copy = Image.fromarray(image).resize((COPY_SIDE, COPY_SIDE), Image.Resampling.BOX)
    return ImageHash(digest([encoded]), perceptual_hash(image), np.asarray(copy))


def hash_images(contents: Sequence[Callable[[], Content]]) -> Iterator[ImageHash | str]:
    """Hash images in threads, which Pillow's decoders and the hash function run in side by side.

    Args:
        contents: each is called in this thread, in order, since sources are not safe to share.

    Yields:
        In order, the hash of each image, or the message of the `DataError` or `ImageError` about it.
    """
    return track(_hashes(contents), "comparing images", len(contents), "images")


def _hashes(contents: Sequence[Callable[[], Content]]) -> Iterator[ImageHash | str]:
    workers = min(
        16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with ThreadPoolExecutor(workers) as pool:
        # Only a few contents are in memory at a time.
        pending: deque[Future[ImageHash] | str] = deque()
        for content in contents:
            try:
                pending.append(pool.submit(hash_image, content()))
            except DataError as error:
                pending.append(str(error))
            if len(pending) >= 4 * workers:
                yield _result(pending.popleft())
        for future in pending:
            yield _result(future)


def _result(hashed: Future[ImageHash] | str) -> ImageHash | str:
    if isinstance(hashed, str):
        return hashed
    try:
        return hashed.result()
    except ImageError as error:
        return str(error)


def near_groups(bits: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Label the groups of images that are nearly the same, directly or through others.

    Hashes that differ by at most `MAX_BITS` bits agree in one of `MAX_BITS` + 1 bands of their bits, so only images that agree in
    a band are compared: of 100,000 photographs, 1% of all pairs.

    Args:
        bits: uint64 [N], the hashes.
        copies: uint8 [N, 24, 24, 3], the small copies.

    Returns:
        int64 [N], labels from 0.
    """
    if not len(bits):
        return np.empty(0, dtype=np.int64)
    # Thousands of equal images, e.g. black ones, are compared with others once.
    first: dict[bytes, int] = {}
    of_row = [
        first.setdefault(h.tobytes() + c.tobytes(), len(first)) for h, c in zip(bits, copies, strict=True)
    ]
    unique = np.unique(of_row, return_index=True)[1]
    search = _Search(bits[unique], copies[unique])
    edges = np.linspace(0, 64, MAX_BITS + 2).round().astype(int)
    for start, end in pairwise(edges):
        search.compare(search.bits >> np.uint64(start) & np.uint64((1 << int(end - start)) - 1))
    search.connect()
    return search.labels[of_row]


class _Search:
    """Connects nearly equal images; `labels` are those of the groups as of the last `connect`."""

    def __init__(self, bits: np.ndarray, copies: np.ndarray) -> None:
        self.bits, self.copies = bits, copies.reshape(len(copies), -1)
        self.labels = np.arange(len(bits))
        self._pairs: list[np.ndarray] = []

    def compare(self, band: np.ndarray) -> None:
        """Compare the images with equal values of `band`, int [N]."""
        order = np.argsort(band, kind="stable")
        band = band[order]
        first = np.arange(len(band))
        distance = 1
        while len(first):
            # Each image is compared with the one `distance` places further on, as long as that has the same value.
            first = first[first + distance < len(band)]
            first = first[band[first] == band[first + distance]]
            a, b = order[first], order[first + distance]
            near = np.bitwise_count(self.bits[a] ^ self.bits[b]) <= MAX_BITS
            near &= self.labels[a] != self.labels[b]
            self._compare_copies(a[near], b[near])
            distance += 1

    def _compare_copies(self, a: np.ndarray, b: np.ndarray) -> None:
        if not len(a):
            return
        x, y = self.copies[a].astype(np.float32), self.copies[b].astype(np.float32)
        difference = np.abs(x - y)
        same = (difference.mean(1) <= MAX_MEAN) & (difference.max(1) <= MAX_PIXEL)
        x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
        same &= (x * y).sum(1) >= MIN_CORRELATION * np.sqrt((x * x).sum(1) * (y * y).sum(1))
        self._pairs.append(np.stack([a[same], b[same]]))
        if sum(pairs.shape[1] for pairs in self._pairs) > 1000:
            # Images of one group are not compared again, which matters for the frames of a film.
            self.connect()

    def connect(self) -> None:
        """Merge the groups of the pairs that were found."""
        n = len(self.labels)
        a, b = np.concatenate([np.empty((2, 0), dtype=np.int64), *self._pairs], axis=1)
        _, of_label = np.unique(self.labels, return_index=True)
        a, b = np.append(a, np.arange(n)), np.append(b, of_label[self.labels])
        graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(n, n))
        self.labels = connected_components(graph, directed=False)[1].astype(np.int64)
        self._pairs = []
