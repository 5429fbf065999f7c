"""The image that a visitor of the page looks at, and the mask of its key object."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from vlm_calibration.demo.questions import right_answer, scene_queries, scene_seed
from vlm_calibration.demo.scenes import CORNERS, render_scene
from vlm_calibration.inference.asking import pixels_of
from vlm_calibration.perturbation.images import resize_image
from vlm_calibration.perturbation.masks import resize_mask
from vlm_calibration.records import DataError, Query
from vlm_calibration.regions.describer import Describer
from vlm_calibration.regions.detector import Detector
from vlm_calibration.regions.segmenter import Segmenter

Editor: TypeAlias = Mapping[str, Any] | None
"""Value of `gr.ImageEditor`, whose `layers` are uint8 [H', W', 4], transparent where nothing is painted."""
DRAWN, DETECTED, WHOLE = "what I paint", "what a detector finds", "the whole image"
MAX_UPLOAD = 20 << 20  # largest size of an uploaded file in bytes
MAX_PIXELS = 50_000_000  # most pixels of an uploaded image; photographs have 12 to 48 million
MAX_SIDE = 2048  # uploaded images are shrunk to this longer side; no model here has a higher resolution


@dataclass
class Subject:
    """An image with its known objects.

    Attributes:
        image: uint8 [H, W, 3].
        objects: name -> mask, bool [H, W].
        corners: name -> corner of each object of a scene of the demo.
        question: a first question about it.
        detected: question -> mask that a detector found for it, None if it found nothing.
    """

    image: np.ndarray
    objects: Mapping[str, np.ndarray] = field(default_factory=dict)
    corners: Mapping[str, str] = field(default_factory=dict)
    question: str = ""
    detected: dict[str, np.ndarray | None] = field(default_factory=dict)

    def asked_about(self, question: str) -> str | None:
        """The known object that a question names, or that is in the corner that it names."""
        if (answer := right_answer(question, self.corners)) in self.objects:
            return answer
        named = (n for n in self.objects if re.search(rf"\b{re.escape(n)}s?\b", question, re.IGNORECASE))
        return next(named, None)


def demo_subject(index: int) -> Subject:
    """A scene of the demo's development split, with exact masks of its objects."""
    scene = render_scene(scene_seed("development", index))
    objects = {o.name: o.mask for o in scene.objects if o.mask.any()}
    corners = {o.name: CORNERS[o.corner] for o in scene.objects}
    return Subject(scene.image, objects, corners, scene_queries("development", index)[0].question)


def uploaded_subject(path: str | Path) -> Subject:
    """Read an uploaded image; raises a DataError that does not reveal its path if it cannot be used."""
    image = pixels_of(path, MAX_PIXELS, name="the image")
    return Subject(with_longer_side(image, MAX_SIDE) if max(image.shape) > MAX_SIDE else image)


def with_longer_side(image: np.ndarray, pixels: int) -> np.ndarray:
    """The image, uint8 [H, W, 3], resized so that its longer side has so many pixels."""
    height, width = (max(1, round(n * pixels / max(image.shape[:2]))) for n in image.shape[:2])
    return resize_image(image, (height, width))


def painted(editor: Editor, shape: Sequence[int]) -> np.ndarray | None:
    """The painted mask of an image of this shape, bool [H, W]; None if nothing is painted."""
    layers = [layer[..., 3] > 0 for layer in (editor or {}).get("layers") or ()]
    mask = np.logical_or.reduce(layers) if layers else np.zeros(1, bool)
    return resize_mask(mask, (shape[0], shape[1])) if mask.any() else None


@dataclass(frozen=True)
class KeyObjectFinder:
    """Finds the objects of a question in an image: names, boxes, then masks."""

    describer: Describer
    detector: Detector
    segmenter: Segmenter

    def find(self, subject: Subject, question: str) -> np.ndarray | None:
        """The mask of all objects that the question names, bool [H, W]; None if there are none. Cached in the subject."""
        if question in subject.detected:
            return subject.detected[question]
        # The answer does not change which objects are named.
        query = Query("question", "", question, "Yes", "yes_no")
        [described] = self.describer.describe([query], [subject.image])
        mask = None
        if described.objects:
            [detections] = self.detector.detect([subject.image], [described.objects])
            if boxes := [detection.box for detection in detections]:
                [masks] = self.segmenter.segment([subject.image], [boxes])
                mask = np.logical_or.reduce(masks) if masks.any() else None
        subject.detected[question] = mask
        return mask


def key_object(
    subject: Subject, choice: str, editor: Editor, question: str, finder: KeyObjectFinder | None
) -> np.ndarray:
    """The mask, bool [H, W], of an object by its name, `DETECTED`, `DRAWN` or `WHOLE`; or a DataError that tells what to do."""
    if choice in subject.objects:
        return subject.objects[choice]
    if choice == WHOLE:
        return np.ones(subject.image.shape[:2], dtype=bool)
    if choice == DETECTED and finder is not None:
        if (mask := finder.find(subject, question)) is None:
            advice = "paint over it, or choose the whole image"
            raise DataError(f"The detector finds no object of this question: {advice}.")
        return mask
    if (drawn := painted(editor, subject.image.shape)) is None:
        raise DataError("Paint over the key object to perturb it.")
    return drawn
