"""Perturbed copies of the images of an evaluation, for estimators and probes that score an answer with a changed image.

They are made in the data workers from the image that the model is asked about, whatever has happened to it before, and at the
resolution at which the model sees it. They are a pure function of the copy's settings and the query id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_calibration.data.noise import ImageCopy, NoisePolicy, Sample, query_rng
from vlm_calibration.data.resolution import resize_to_model
from vlm_calibration.perturbation.by_kind import region_perturbation
from vlm_calibration.perturbation.images import resize_mask
from vlm_calibration.perturbation.masks import BoolMask
from vlm_calibration.perturbation.regions import region_mask
from vlm_calibration.records import LoadedImage


def perturbed_copies(
    sample: Sample,
    loaded: LoadedImage,
    copies: Sequence[ImageCopy],
    policy: NoisePolicy,
    image_processor: Any,
) -> dict[ImageCopy, np.ndarray | None]:
    """The perturbed copies of a sample's image, uint8 [H, W, 3] each; None for a copy whose region the image lacks.

    A distractor is a random one of those that do not touch the key object; there may be none.

    Args:
        sample: the query with its image.
        loaded: the masks of the image's objects, of the size of the file's image.
        copies: what copies are made.
        policy: the resolution, the noise schedule, and the shape and growth of regions.
        image_processor: defines the size at which the model sees the image; unused at native resolution.
    """
    image = resize_to_model(image_processor, sample.image) if policy.resolution == "model" else sample.image
    size = image.shape[:2]

    def grown(masks: Sequence[BoolMask]) -> list[BoolMask]:
        return [
            region_mask(resize_mask(m, size), shape=policy.shape, dilate=policy.dilate)
            for m in masks
            if m.any()
        ]

    regions = {copy.region for copy in copies}
    evidence = grown(loaded.evidence) if regions - {"image"} else []
    target = np.logical_or.reduce(evidence) if evidence else None
    apart: list[BoolMask] = []
    if "distractor" in regions:
        distractors = grown(loaded.distractors)
        apart = [mask for mask in distractors if target is None or not np.any(mask & target)]
    made: dict[ImageCopy, np.ndarray | None] = {}
    for copy in copies:
        rng = query_rng(copy.seed, copy.number, sample.query.id, "copy")
        seed = int(rng.integers(2**63))
        region: BoolMask | None = np.ones(size, dtype=np.bool_)
        if copy.region == "object":
            region = target
        elif copy.region == "distractor":
            region = apart[int(rng.integers(len(apart)))] if apart else None
        made[copy] = None
        if region is not None:
            transform = region_perturbation(copy.perturbation.kind, policy.schedule)
            made[copy] = transform(image=image, mask=region, strength=copy.perturbation.strength, seed=seed)[
                "image"
            ]
    return made
