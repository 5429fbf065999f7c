"""Perturbed copies of the images of an evaluation, for estimators that ask how an answer stands mild perturbation.

They are made in the data workers from the image that the model is asked about, whatever has happened to it before, and at the
resolution at which the model sees it. They are a pure function of (seed, query id).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vlm_calibration.data.noise import NoisePolicy, Sample, query_rng
from vlm_calibration.data.resolution import resize_to_model
from vlm_calibration.perturbation.by_kind import region_perturbation
from vlm_calibration.perturbation.images import resize_mask
from vlm_calibration.perturbation.levels import Perturbation
from vlm_calibration.perturbation.masks import BoolMask
from vlm_calibration.perturbation.regions import region_mask

PerturbedRegion = Literal["image", "object"]


@dataclass(frozen=True)
class CopySettings:
    """What copies of an image are made.

    Args:
        perturbations: one for each copy.
        region: perturb the whole image or the key object.
        seed: of all random choices.
    """

    perturbations: tuple[Perturbation, ...]
    region: PerturbedRegion = "image"
    seed: int = 0


def perturbed_copies(
    sample: Sample,
    evidence: Sequence[BoolMask],
    settings: CopySettings,
    policy: NoisePolicy,
    image_processor: Any,
) -> tuple[np.ndarray, ...]:
    """The perturbed copies of a sample's image, uint8 [H, W, 3] each; none if the key object is to be perturbed and has no region.

    Args:
        sample: the query with its image.
        evidence: masks of the key objects, bool, of the size of the file's image.
        settings: what copies are made.
        policy: the resolution, the noise schedule, and the shape and growth of regions.
        image_processor: defines the size at which the model sees the image; unused at native resolution.
    """
    if settings.region == "object" and not evidence:
        return ()
    image = resize_to_model(image_processor, sample.image) if policy.resolution == "model" else sample.image
    size = image.shape[:2]
    region = np.ones(size, dtype=np.bool_)
    if settings.region == "object":
        masks = [resize_mask(mask, size) for mask in evidence]
        region = np.logical_or.reduce(
            [region_mask(m, shape=policy.shape, dilate=policy.dilate) for m in masks]
        )
    copies = []
    for number, (kind, strength) in enumerate(settings.perturbations):
        rng = query_rng(settings.seed, number, sample.query.id, "copy")
        transform = region_perturbation(kind, policy.schedule)
        copies.append(
            transform(image=image, mask=region, strength=strength, seed=int(rng.integers(2**63)))["image"]
        )
    return tuple(copies)
