"""Images that the sources of different splits share: a model or a recalibration must not be scored on images that it has seen.

Compared are the places where images are stored, the contents of their files, and how they look (`image_hash`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from vlm_calibration.data.image_hash import ImageHash, hash_images, near_groups
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.files import MAX_NAMED
from vlm_calibration.records import Query

ROLES = {
    "train": "train",
    "validation": "validation",
    "levels": "calibration",
    "calibration": "calibration",
    "test": "test",
}
"""Section of a configuration -> role of its sources. Sources of one role may share images."""

LeakKind = Literal["same file", "same content", "near-identical"]


class Leak(NamedTuple):
    """Images that two splits share.

    Attributes:
        kind: the closest way in which each image of `second` is found in `first`.
        first: role of one split.
        second: role of the other, later in `ROLES`.
        images: number of images of `second`.
        examples: the first few, as "image of first = image of second".
    """

    kind: LeakKind
    first: str
    second: str
    images: int
    examples: tuple[str, ...]


class LeakReport(NamedTuple):
    """The comparison of all splits.

    Attributes:
        images: role -> number of images.
        leaks: those that were found.
        unreadable: `image_id` of each image that could not be compared -> why.
    """

    images: dict[str, int]
    leaks: tuple[Leak, ...]
    unreadable: dict[str, str]


class SplitImages:
    """The images of all splits, each once, with the roles that use it.

    Args:
        sources: name, such as "data.test.random" -> source; those without a role are left out.
    """

    def __init__(self, sources: Mapping[str, QuerySource]) -> None:
        self.roles: list[str] = []
        self._owners: list[tuple[QuerySource, Query]] = []
        self._index: dict[str, int] = {}
        users: dict[str, set[int]] = {}
        for name, source in sources.items():
            role = ROLES.get(name.removeprefix("data.").split(".", 1)[0])
            if role is not None:
                users.setdefault(role, set()).update(self._add(source))
        self.roles = [role for role in dict.fromkeys(ROLES.values()) if role in users]
        self.uses = np.zeros((len(self.roles), len(self._owners)), dtype=bool)
        for row, role in zip(self.uses, self.roles, strict=True):
            row[list(users[role])] = True

    def _add(self, source: QuerySource) -> set[int]:
        """Indices of the images of a source."""
        indices = set()
        for query in source.queries():
            index = self._index.setdefault(source.image_id(query), len(self._owners))
            if index == len(self._owners):
                self._owners.append((source, query))
            indices.add(index)
        return indices

    def __len__(self) -> int:
        return len(self._owners)

    def name(self, index: int) -> str:
        """Name of an image in the source that it was first found in."""
        return self._owners[index][1].image

    def id(self, index: int) -> str:
        """The `image_id` of an image."""
        source, query = self._owners[index]
        return source.image_id(query)

    def hashes(self) -> list[ImageHash | str]:
        """The hash of each image, or why there is none."""
        contents = [partial(source.image_content, query) for source, query in self._owners]
        return list(hash_images(contents))


def find_leaks(images: SplitImages) -> LeakReport:
    """Compare the images of all splits.

    Args:
        images: of all splits.
    """
    hashes = images.hashes()
    usable = np.array([i for i, hashed in enumerate(hashes) if isinstance(hashed, ImageHash)], dtype=np.int64)
    valid = [hashed for hashed in hashes if isinstance(hashed, ImageHash)]
    # An image without a hash is alone in its group.
    contents, looks = np.arange(len(images)), np.arange(len(images))
    if valid:
        contents[usable] = len(images) + np.unique([h.digest for h in valid], return_inverse=True)[1]
        groups = near_groups(np.array([h.bits for h in valid]), np.stack([h.copy for h in valid]))
        looks[usable] = len(images) + groups
    labels: dict[LeakKind, np.ndarray] = {
        "same file": np.arange(len(images)),
        "same content": contents,
        "near-identical": looks,
    }
    leaks: list[Leak] = []
    for first, second in combinations(range(len(images.roles)), 2):
        leaks += _shared(images, first, second, labels)
    counts = {role: int(used.sum()) for role, used in zip(images.roles, images.uses, strict=True)}
    unreadable = {images.id(i): reason for i, reason in enumerate(hashes) if isinstance(reason, str)}
    return LeakReport(counts, tuple(leaks), unreadable)


def _shared(
    images: SplitImages, first: int, second: int, labels: Mapping[LeakKind, np.ndarray]
) -> Sequence[Leak]:
    """The leaks of two roles; an image counts for the closest kind alone."""
    leaks = []
    rest = np.flatnonzero(images.uses[second])
    others = np.flatnonzero(images.uses[first])
    for kind, label in labels.items():
        shared = np.isin(label[rest], label[others])
        found, rest = rest[shared], rest[~shared]
        if len(found):
            examples = []
            for image in found[:MAX_NAMED].tolist():
                other = int(others[label[others] == label[image]][0])
                name = images.name(image)
                examples.append(name if other == image else f"{images.name(other)} = {name}")
            leaks.append(Leak(kind, images.roles[first], images.roles[second], len(found), tuple(examples)))
    return leaks
