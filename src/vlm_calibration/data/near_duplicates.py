"""Images that are the same, or nearly so: encoded again, resized or slightly brightened, but not cropped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.files import MAX_NAMED
from vlm_calibration.perturbation.images import ImageError, load_image
from vlm_calibration.progress import track
from vlm_calibration.records import DataError, Query
from vlm_calibration.settings import digest

SIDE = 128  # least side of a reduced image that hash and small copy are computed from, in pixels
MAX_BITS = 6  # bits of 64 by which the hashes of nearly equal images may differ
MIN_CORRELATION = 0.97
"""Least correlation of small copies, in [-1, 1]. Tells apart pages of text, whose hashes often agree."""
MAX_MEAN, MAX_PIXEL = 10.0, 64
"""Largest mean and largest single difference of small copies, of 255. Tell apart scenes with one background."""

ROLES = ("train", "validation", "teacher", "calibration", "test")
"""What sources are for; those of one role may share images. The section `levels` has the role "calibration"."""


class ImageHash(NamedTuple):
    """A digest of an image's content, its perceptual hash, and a small copy, uint8 [24, 24, 3]."""

    digest: str
    bits: np.uint64
    copy: np.ndarray


def hash_image(content: Path | bytes | np.ndarray) -> ImageHash:
    """Hash an image: a file, the bytes of one, or pixels, uint8 [H, W, 3]; an ImageError if it cannot be read."""
    if isinstance(content, np.ndarray):
        encoded, pixels = content.tobytes(), content
    else:
        try:
            encoded = content.read_bytes() if isinstance(content, Path) else content
        except OSError as error:
            raise ImageError(f"{content!s}: cannot be opened: {error.strerror}") from error
        pixels = load_image(encoded, least=SIDE)
    image = Image.fromarray(pixels)
    bits = np.packbits(imagehash.phash(image).hash).view(">u8")[0].astype(np.uint64)
    return ImageHash(digest([encoded]), bits, np.asarray(image.resize((24, 24), Image.Resampling.BOX)))


def hash_images(images: Sequence[tuple[QuerySource, Query]]) -> list[ImageHash | str]:
    """The hash of each query's image, or the message of the `DataError` or `ImageError` about it."""
    # Pillow's decoders run side by side in threads, but sources are not safe to share.
    lock = Lock()

    def hashed(image: tuple[QuerySource, Query]) -> ImageHash | str:
        source, query = image
        try:
            with lock:
                content = source.image_content(query)
            return hash_image(content)
        except (DataError, ImageError) as error:
            return str(error)

    with ThreadPool(min(16, os.cpu_count() or 1)) as pool:
        return list(track(pool.imap(hashed, images), "comparing images", len(images), "images"))


def group_images(hashes: Sequence[ImageHash | str], near: bool) -> np.ndarray:
    """Label the groups of images that are the same, or with `near` nearly so: int64 [N] from 0; -1 for an image without a hash.

    The labels depend on the images alone, not on their order.
    """
    groups = np.full(len(hashes), -1, dtype=np.int64)
    if valid := [hashed for hashed in hashes if isinstance(hashed, ImageHash)]:
        _, first, labels = np.unique([h.digest for h in valid], return_index=True, return_inverse=True)
        if near:
            looks = [valid[i] for i in first]
            labels = near_groups(np.array([h.bits for h in looks]), np.stack([h.copy for h in looks]))[labels]
        groups[[isinstance(hashed, ImageHash) for hashed in hashes]] = labels
    return groups


def near_groups(bits: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Label the groups of images that are nearly the same, directly or through others, from 0: int64 [N].

    All pairs of `bits`, the hashes, uint64 [N], are compared: 100,000 take seconds. `copies` are uint8 [N, 24, 24, 3].
    """
    flat = copies.reshape(len(copies), -1)
    labels = np.arange(len(bits))
    for image, hashed in enumerate(bits):
        others = image + 1 + np.flatnonzero(np.bitwise_count(bits[image + 1 :] ^ hashed) <= MAX_BITS)
        # Images of one group are not compared again, which matters for the frames of a film.
        others = others[labels[others] != labels[image]]
        same = others[_copies_agree(flat[image], flat[others])] if len(others) else others
        if len(same):
            group = labels[[image, *same]]
            labels[np.isin(labels, group)] = group.min()
    return np.unique(labels, return_inverse=True)[1]


def _copies_agree(copy: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether a small copy agrees with each of others; uint8 [D] and [N, D], the result bool [N]."""
    a, b = copy.astype(np.float32), others.astype(np.float32)
    difference = np.abs(a - b)
    close = (difference.mean(1) <= MAX_MEAN) & (difference.max(1) <= MAX_PIXEL)
    a, b = a - a.mean(), b - b.mean(1, keepdims=True)
    return close & ((a * b).sum(1) >= MIN_CORRELATION * np.sqrt((a * a).sum() * (b * b).sum(1)))


class Leak(NamedTuple):
    """Images of the role `second` that `first` has as well, by the closest `kind`: "same file", "same content" or "near-identical"."""

    kind: str
    first: str
    second: str
    images: int
    examples: tuple[str, ...]


class LeakReport(NamedTuple):
    """Number of images by role (empty with fewer than two), what they share, and why images could not be compared, by `image_id`."""

    images: dict[str, int]
    leaks: tuple[Leak, ...]
    unreadable: dict[str, str]


def find_leaks(sources: Mapping[str, QuerySource]) -> LeakReport:
    """Compare where images are stored, the contents of their files, and how they look.

    `sources` are named like "data.test.random"; those without a role are left out.
    """
    owners: dict[str, tuple[QuerySource, Query]] = {}
    number_of: dict[str, int] = {}
    used: dict[str, set[int]] = {}
    for name, source in sources.items():
        section = name.removeprefix("data.").split(".", 1)[0]
        role = "calibration" if section == "levels" else section
        for query in source.queries() if role in ROLES else ():
            image = source.image_id(query)
            owners.setdefault(image, (source, query))
            used.setdefault(role, set()).add(number_of.setdefault(image, len(number_of)))
    if len(used) < 2:
        return LeakReport({}, (), {})
    hashes = hash_images(list(owners.values()))
    names = [query.image for _, query in owners.values()]
    alone = np.arange(len(names))
    labels = {"same file": alone}
    for kind, near in (("same content", False), ("near-identical", True)):
        groups = group_images(hashes, near)
        labels[kind] = np.where(groups < 0, -1 - alone, groups)
    leaks = []
    for first, second in combinations([role for role in ROLES if role in used], 2):
        rest = sorted(used[second])
        for kind, label in labels.items():
            of_label = {label[i]: i for i in sorted(used[first], reverse=True)}
            shared = [(of_label[label[i]], i) for i in rest if label[i] in of_label]
            rest = [i for i in rest if label[i] not in of_label]
            if shared:
                pairs = [(names[a], "" if a == b else f" = {names[b]}") for a, b in shared[:MAX_NAMED]]
                leaks.append(Leak(kind, first, second, len(shared), tuple(map("".join, pairs))))
    unreadable = {image: text for image, text in zip(owners, hashes, strict=True) if isinstance(text, str)}
    return LeakReport({role: len(used[role]) for role in ROLES if role in used}, tuple(leaks), unreadable)
