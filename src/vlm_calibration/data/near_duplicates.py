"""Images that are the same or nearly the same: encoded again, resized or slightly brightened, but not cropped or mirrored.

The perceptual hash finds candidates among all pairs. Images of one scene with other small objects agree in it, so a pair counts as
nearly the same only if small copies agree as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.files import MAX_NAMED
from vlm_calibration.perturbation.images import ImageError, load_image
from vlm_calibration.progress import track
from vlm_calibration.records import DataError, Query
from vlm_calibration.settings import digest

SIDE = 128
"""Least side of a reduced image that hash and small copy are computed from, in pixels."""
COPY_SIDE = 24
"""Side of the small copy."""
MAX_BITS = 6
"""Bits of 64 by which the hashes of nearly equal images may differ."""
MIN_CORRELATION = 0.97
"""Least correlation of small copies, in [-1, 1]. Tells apart pages of text, whose hashes often agree."""
MAX_MEAN, MAX_PIXEL = 10.0, 64
"""Largest mean and largest single difference of small copies, of 255. Tell apart scenes with one background."""
CHUNK = 64
"""Images whose contents are in memory at a time."""

ROLES = ("train", "validation", "calibration", "test")
"""What sources are for; those of one role may share images. The section `levels` has the role "calibration"."""

Content = Path | bytes | np.ndarray


class ImageHash(NamedTuple):
    """What an image is recognized by: a digest of its content, its perceptual hash, and a small copy, uint8 [24, 24, 3]."""

    digest: str
    bits: np.uint64
    copy: np.ndarray


def hash_image(content: Content) -> ImageHash:
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
    copy = image.resize((COPY_SIDE, COPY_SIDE), Image.Resampling.BOX)
    return ImageHash(digest([encoded]), bits, np.asarray(copy))


def hash_images(images: Sequence[tuple[QuerySource, Query]]) -> list[ImageHash | str]:
    """The hash of each query's image, or the message of the `DataError` or `ImageError` about it.

    Images are hashed in threads, which Pillow's decoders run in side by side; sources are not safe to share.
    """

    def hashed(content: Content | str) -> ImageHash | str:
        try:
            return content if isinstance(content, str) else hash_image(content)
        except ImageError as error:
            return str(error)

    def hashes() -> Iterator[ImageHash | str]:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for start in range(0, len(images), CHUNK):
                contents: list[Content | str] = []
                for source, query in images[start : start + CHUNK]:
                    try:
                        contents.append(source.image_content(query))
                    except DataError as error:
                        contents.append(str(error))
                yield from pool.map(hashed, contents)

    return list(track(hashes(), "comparing images", len(images), "images"))


def group_images(hashes: Sequence[ImageHash | str], near: bool) -> np.ndarray:
    """Label the groups of images that are the same, or with `near` nearly so: int64 [N] from 0; -1 for an image without a hash.

    The labels depend on the images alone, not on their order.
    """
    usable = np.array([isinstance(hashed, ImageHash) for hashed in hashes], dtype=bool)
    groups = np.full(len(hashes), -1, dtype=np.int64)
    valid = [hashed for hashed in hashes if isinstance(hashed, ImageHash)]
    if valid:
        _, first, labels = np.unique([h.digest for h in valid], return_index=True, return_inverse=True)
        if near:
            looks = [valid[i] for i in first]
            labels = near_groups(np.array([h.bits for h in looks]), np.stack([h.copy for h in looks]))[labels]
        groups[usable] = labels
    return groups


def near_groups(bits: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Label the groups of images that are nearly the same, directly or through others, from 0: int64 [N].

    Hashes that differ by at most `MAX_BITS` bits agree in one of `MAX_BITS` + 1 bands of their bits, so only images that agree in
    a band are compared: of 100,000 photographs, 1% of all pairs.

    Args:
        bits: uint64 [N], the hashes.
        copies: uint8 [N, 24, 24, 3], the small copies.
    """
    flat = copies.reshape(len(copies), -1)
    labels = np.arange(len(bits))
    for start, end in pairwise(np.linspace(0, 64, MAX_BITS + 2).round().astype(int).tolist()):
        band = bits >> np.uint64(start) & np.uint64((1 << (end - start)) - 1)
        order = np.argsort(band, kind="stable")
        band = band[order]
        rows, distance = np.arange(len(band)), 1
        while len(rows):
            # Each image is compared with the one `distance` places further on, as long as that has the same band.
            rows = rows[rows + distance < len(band)]
            rows = rows[band[rows] == band[rows + distance]]
            a, b = order[rows], order[rows + distance]
            # Images of one group are not compared again, which matters for the frames of a film.
            near = (np.bitwise_count(bits[a] ^ bits[b]) <= MAX_BITS) & (labels[a] != labels[b])
            a, b = a[near], b[near]
            same = _copies_agree(flat[a], flat[b])
            if same.any():
                edges = np.ones(int(same.sum()), dtype=bool), (labels[a[same]], labels[b[same]])
                graph = coo_array(edges, shape=(len(bits), len(bits)))
                labels = connected_components(graph, directed=False)[1].astype(np.int64)[labels]
            distance += 1
    return labels


def _copies_agree(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether each pair of small copies agrees; uint8 [N, D] both, the result bool [N]."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    difference = np.abs(a - b)
    close = (difference.mean(1) <= MAX_MEAN) & (difference.max(1) <= MAX_PIXEL)
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return close & ((a * b).sum(1) >= MIN_CORRELATION * np.sqrt((a * a).sum(1) * (b * b).sum(1)))


class Leak(NamedTuple):
    """Images of the role `second` that the role `first` has as well.

    `kind` is the closest way: "same file", "same content" or "near-identical". Examples are "image of first = image of second".
    """

    kind: str
    first: str
    second: str
    images: int
    examples: tuple[str, ...]


class LeakReport(NamedTuple):
    """Number of images by role (empty if there are not two roles), what they share, and why images could not be compared by `image_id`."""

    images: dict[str, int]
    leaks: tuple[Leak, ...]
    unreadable: dict[str, str]


def find_leaks(sources: Mapping[str, QuerySource]) -> LeakReport:
    """Compare where images are stored, the contents of their files, and how they look.

    `sources` are named like "data.test.random"; those without a role are left out.
    """
    index: dict[str, int] = {}
    owners: list[tuple[QuerySource, Query]] = []
    uses: dict[str, set[int]] = {}
    for name, source in sources.items():
        section = name.removeprefix("data.").split(".", 1)[0]
        role = "calibration" if section == "levels" else section
        for query in source.queries() if role in ROLES else ():
            number = index.setdefault(source.image_id(query), len(owners))
            if number == len(owners):
                owners.append((source, query))
            uses.setdefault(role, set()).add(number)
    if len(uses) < 2:
        return LeakReport({}, (), {})
    hashes = hash_images(owners)
    alone = np.arange(len(owners))
    labels = {"same file": alone}
    for kind, near in (("same content", False), ("near-identical", True)):
        groups = group_images(hashes, near)
        labels[kind] = np.where(groups < 0, -1 - alone, groups)
    leaks = []
    used = {role: np.array(sorted(uses[role])) for role in ROLES if role in uses}
    for first, second in combinations(used, 2):
        rest = used[second]
        for kind, label in labels.items():
            shared = np.isin(label[rest], label[used[first]])
            found, rest = rest[shared], rest[~shared]
            examples = []
            for image in found[:MAX_NAMED].tolist():
                other = int(used[first][label[used[first]] == label[image]][0])
                name, same = owners[image][1].image, owners[other][1].image
                examples.append(name if other == image else f"{same} = {name}")
            if examples:
                leaks.append(Leak(kind, first, second, len(found), tuple(examples)))
    unreadable = {name: reason for name, reason in zip(index, hashes, strict=True) if isinstance(reason, str)}
    return LeakReport({role: len(images) for role, images in used.items()}, tuple(leaks), unreadable)
