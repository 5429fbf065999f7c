"""The demo's scenes as a query source; scenes are drawn when they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from vlm_calibration.data.sources.base import QuerySource, opposite, with_masks
from vlm_calibration.demo.pictures import Hand, check_installed
from vlm_calibration.demo.questions import scene_queries, scene_seed
from vlm_calibration.demo.scenes import CLASSES, hard_kind, render_scene, scene_layout
from vlm_calibration.demo.shifts import SHIFTS, draw_shift
from vlm_calibration.records import DataError, LoadedImage, Query

# The three questions about a scene often follow each other. Nothing changes what is drawn.
_drawn = lru_cache(maxsize=4)(render_scene)


def scene_index(query: Query) -> int:
    """Index of the scene of a demo query."""
    return int(query.image.rsplit("-", 1)[1])


class DemoSource(QuerySource):
    """Existence and corner questions about rendered scenes: three per scene, with exact masks.

    Args:
        split: "train", "calibration", "development" or "test"; splits share no scene. Choose settings on "development".
        scenes: number of scenes.
        first: index of the first scene, for sources of one split without overlap.
        shifted: apply one of the demo's shifts to each image (low contrast, JPEG, shrinking, glare, coloured light).
        hard: share of naturally hard scenes (`HARD_KINDS`), in [0, 1]. Which are hard depends on the split and the index alone.
        hand: "colour", or "line" for line drawings with a pale wash, which need resvg-py.
    """

    annotates_all = True

    def __init__(
        self,
        split: str = "train",
        scenes: int = 1000,
        first: int = 0,
        shifted: bool = False,
        hard: float = 0.0,
        hand: Hand = "colour",
    ) -> None:
        if scenes < 1 or first < 0:
            raise DataError(f"DemoSource: needs scenes >= 1 and first >= 0, found {scenes} and {first}")
        if not 0 <= hard <= 1:
            raise DataError(f"DemoSource: hard is a share of scenes from 0 to 1, found {hard}")
        scene_seed(split, first)  # raises for an unknown split here instead of in a worker
        self.split, self.scenes, self.first = split, scenes, first
        self.shifted, self.hard = shifted, hard
        self.hand: Hand = hand

    def _scene(self, index: int) -> tuple[tuple[int, int], str]:
        """The seed of a scene, and its kind."""
        seed = scene_seed(self.split, index)
        return seed, hard_kind(seed, self.hard)

    def queries(self) -> Sequence[Query]:
        check_installed(self.hand)  # raises for a missing package here instead of in a worker
        queries: list[Query] = []
        for index in range(self.first, self.first + self.scenes):
            seed, kind = self._scene(index)
            of_scene = scene_queries(self.split, index, kind)
            if self.shifted:
                shift, _ = draw_shift(np.random.default_rng((*seed, 3)))
                of_scene = [replace(query, category=f"{shift}/{query.category}") for query in of_scene]
            queries += of_scene
        return queries

    def load(self, query: Query) -> LoadedImage:
        seed, kind = self._scene(scene_index(query))
        image, objects = _drawn(seed, kind, self.hand)
        if self.shifted:
            rng = np.random.default_rng((*seed, 3))
            name, strength = draw_shift(rng)
            image = SHIFTS[name][0](image, strength, rng)
        return with_masks(query, image, ((o.name, o.mask) for o in objects))

    def image_digest(self, query: Query) -> str:
        """What the scene is drawn from; its pixels differ between versions of the libraries that draw it."""
        return f"{query.image} {self.hand} {self.shifted}"

    def wrong_answers(self, query: Query) -> Sequence[str]:
        names = scene_layout(*self._scene(scene_index(query))).names
        in_scene = [name for name in names if name != query.answer]
        return opposite(query) or in_scene or [name for name in CLASSES if name != query.answer]

    def labels(self, query: Query) -> Sequence[str]:
        return scene_layout(*self._scene(scene_index(query))).labels
