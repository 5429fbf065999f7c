"""A detector and a segmenter with the exact boxes and masks of the demo's scenes, to test the pipeline around them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vlm_calibration.demo.questions import scene_seed
from vlm_calibration.demo.scenes import Scene, render_scene
from vlm_calibration.perturbation.masks import bounding_box
from vlm_calibration.regions.detector import Box, Detection, Detector
from vlm_calibration.regions.segmenter import Segmenter


class Truth:
    """The scenes of a split by their pixels, enlarged by integer factors."""

    def __init__(self, scenes: int, factors: Sequence[int] = (1,), split: str = "test") -> None:
        self.by_pixels: dict[bytes, tuple[Scene, int]] = {}
        for index in range(scenes):
            scene = render_scene(scene_seed(split, index))
            for factor in factors:
                self.by_pixels[enlarged(scene.image, factor).tobytes()] = scene, factor

    def masks(self, image: np.ndarray) -> dict[str, np.ndarray]:
        scene, factor = self.by_pixels[image.tobytes()]
        return {o.name: enlarged(o.mask, factor) for o in scene.objects if o.mask.any()}


def enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def box_of(mask: np.ndarray) -> Box:
    box = bounding_box(mask)
    return float(box.left), float(box.top), float(box.right), float(box.bottom)


class ExactDetector(Detector):
    """Returns the box of the object whose name ends the phrase, or with `halves` two boxes of its halves."""

    def __init__(self, truth: Truth, halves: bool = False) -> None:
        self.truth = truth
        self.halves = halves
        self.asked: list[tuple[str, ...]] = []

    def load(self, device: torch.device) -> None:
        pass

    def detect(self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        self.asked += [tuple(row) for row in phrases]
        masks = map(self.truth.masks, images)
        return [
            [
                Detection(phrase, box_of(part), 0.9)
                for phrase in row
                for part in self._parts(objects.get(phrase.split()[-1]))
            ]
            for objects, row in zip(masks, phrases, strict=True)
        ]

    def _parts(self, mask: np.ndarray | None) -> list[np.ndarray]:
        if mask is None or not self.halves:
            return [] if mask is None else [mask]
        x0, _, x1, _ = (int(v) for v in box_of(mask))
        left, right = mask.copy(), mask.copy()
        left[:, (x0 + x1) // 2 :] = False
        right[:, : (x0 + x1) // 2] = False
        return [part for part in (left, right) if part.any()]


class ExactSegmenter(Segmenter):
    """Returns the visible part of an object within a box: of the object whose box contains the box."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.encoded = 0

    def load(self, device: torch.device) -> None:
        pass

    def segment(self, images: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]]) -> list[np.ndarray]:
        self.encoded += len(images)
        return [
            np.stack([self._within(self.truth.masks(image), box) for box in row])
            for image, row in zip(images, boxes, strict=True)
        ]

    def _within(self, masks: dict[str, np.ndarray], box: Box) -> np.ndarray:
        def outside(mask: np.ndarray) -> float:
            x0, y0, x1, y1 = box_of(mask)
            misses = (x0 - box[0], y0 - box[1], box[2] - x1, box[3] - y1)
            return sum(max(0.0, miss) for miss in misses), (x1 - x0) * (y1 - y0)  # type: ignore[return-value]

        mask = min(masks.values(), key=outside)
        x0, y0, x1, y1 = (int(v) for v in box)
        part = np.zeros_like(mask)
        part[y0:y1, x0:x1] = mask[y0:y1, x0:x1]
        return part
