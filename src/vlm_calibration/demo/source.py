"""The demo's scenes as a query source; scenes are drawn when they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vlm_calibration.data.sources.base import QuerySource, opposite
from vlm_calibration.demo.questions import scene_queries, scene_seed
from vlm_calibration.demo.scenes import CLASSES, glyph_font, render_scene, scene_layout
from vlm_calibration.demo.shifts import SHIFTS, draw_shift
from vlm_calibration.records import DataError, LoadedImage, Query
from vlm_calibration.text.labels import is_evidence


def scene_index(query: Query) -> int:
    """Index of the scene of a demo query."""
    return int(query.image.rsplit("-", 1)[1])


class DemoSource(QuerySource):
    """Existence and corner questions about rendered scenes: three per scene, with exact masks.

    Args:
        split: "train", "calibration" or "test"; splits share no scene.
        scenes: number of scenes.
        first: index of the first scene, for sources of one split without overlap.
        shifted: apply one of the demo's shifts to each image (blur, occlusion, low contrast, JPEG, shrinking).
    """

    def __init__(
        self, split: str = "train", scenes: int = 1000, first: int = 0, shifted: bool = False
    ) -> None:
        if scenes < 1 or first < 0:
            raise DataError(f"DemoSource: needs scenes >= 1 and first >= 0, found {scenes} and {first}")
        scene_seed(split, first)  # raises for an unknown split here instead of in a worker
        self.split = split
        self.scenes = scenes
        self.first = first
        self.shifted = shifted

    def queries(self) -> Sequence[Query]:
        glyph_font()  # raises for a missing font here instead of in a worker
        indices = range(self.first, self.first + self.scenes)
        return [self._labelled(q, i) for i in indices for q in scene_queries(self.split, i)]

    def _labelled(self, query: Query, index: int) -> Query:
        if not self.shifted:
            return query
        shift, _ = draw_shift(self._shift_rng(index))
        return replace(query, category=f"{shift}/{query.category}")

    def _shift_rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((*scene_seed(self.split, index), 3))

    def load(self, query: Query) -> LoadedImage:
        index = scene_index(query)
        scene = render_scene(scene_seed(self.split, index))
        image = scene.image
        if self.shifted:
            rng = self._shift_rng(index)
            name, strength = draw_shift(rng)
            image = SHIFTS[name](image, strength, rng)
        return LoadedImage(
            image,
            tuple(o.mask for o in scene.objects if is_evidence(query, o.name)),
            tuple(o.mask for o in scene.objects if not is_evidence(query, o.name)),
        )

    def wrong_answers(self, query: Query) -> Sequence[str]:
        names, _ = scene_layout(scene_seed(self.split, scene_index(query)))
        in_scene = [name for name in names if name != query.answer]
        return opposite(query) or in_scene or [name for name in CLASSES if name != query.answer]

    def has_evidence(self, query: Query) -> bool:
        return query.answer != "No"
