"""What a confidence listens to: how it changes when the image, a part of it or the answer is changed.

A calibrated confidence may ignore the image (arXiv 2609.18453). The answer is held, and the confidence after it is read again:

- "image": the whole image is blank;
- "object": the key object is blank, and nothing else;
- "distractor": one object that the question is not about is blank, and nothing else;
- "answer": the likeliest other answer is given, the opposite of yes or no.

A confidence that listens falls without the image and without the key object, hardly moves without a distractor, and adds up to at most 1
with that in the other answer. It is the likeliest of those that can be stated after the answer, and so is the original one. Each probe, and
the original reading, which is that of `ExpectedConfidence`, is one forward pass; another answer than yes or no is generated besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from vlm_calibration.data.noise import CopiedRegion, ImageCopy
from vlm_calibration.perturbation.levels import Perturbation
from vlm_calibration.records import DataError

Probe = Literal["image", "object", "distractor", "answer"]
PROBES: tuple[Probe, ...] = get_args(Probe)
BLANK = Perturbation("fade", 1.0)
"""A whole image is uniformly grey after it; a region is filled with its surroundings, so that its outline does not show the object."""
COPIES: dict[Probe, ImageCopy] = {region: ImageCopy(BLANK, region) for region in get_args(CopiedRegion)}
"""The copy of the image that a probe reads the confidence with."""


def check_probes(probes: Sequence[str]) -> tuple[Probe, ...]:
    """The probes in the order of `PROBES`; DataError if there is no such probe, or one appears twice."""
    if unknown := [probe for probe in probes if probe not in PROBES]:
        raise DataError(f"model.probes: there is no probe {unknown[0]!r}: expected {', '.join(PROBES)}")
    if twice := [probe for probe in PROBES if list(probes).count(probe) > 1]:
        raise DataError(f"model.probes: {twice[0]!r} appears twice")
    return tuple(probe for probe in PROBES if probe in probes)
