"""From queries with their images to queries with regions: describe, detect, segment, unite, and judge each region.

Every query comes out again, with regions or with the reason why it has none; what was found but is not good enough is kept
beside it. What a batch gives depends on nothing but the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np

from vlm_calibration.data.raw import RawQuery
from vlm_calibration.perturbation.masks import bounding_box
from vlm_calibration.perturbation.rle import mask_to_rle
from vlm_calibration.records import DataError, Query, Region
from vlm_calibration.regions.describer import Describer, Description
from vlm_calibration.regions.detector import Detection, Detector
from vlm_calibration.regions.segmenter import Segmenter
from vlm_calibration.text.grading import same_phrase
from vlm_calibration.text.labels import is_evidence

Outcome = Literal["found", "known", "absent", "no phrase", "not detected", "rejected", "unreadable"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)
"""found: at least one region; known: it came with regions; absent: nothing but what the answer says is not there; no phrase:
the describer names nothing; not detected: no box; rejected: no region is good enough; unreadable: no image."""

Reason = Literal["score", "small", "large", "empty"]
"""Why a region is not good enough: its score, its share of the image, or a mask that shares no pixel with its box."""


@dataclass(frozen=True)
class RegionGates:
    """What a region must be like to be used.

    Args:
        min_score: least score of its best box, in [0, 1].
        min_area, max_area: least and largest share of the image, in [0, 1]. Noise on less is not seen; and what covers the
            whole image leaves nothing to tell it from.
    """

    min_score: float = 0.35
    min_area: float = 0.001
    max_area: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1 or not 0 <= self.min_area <= self.max_area <= 1:
            raise DataError(
                f"gates: needs 0 <= min_score <= 1 and 0 <= min_area <= max_area <= 1, found {self}"
            )

    def reason(self, score: float, share: float) -> Reason | None:
        """Why a region with this score and share of the image is not used; None: it is."""
        if score < self.min_score:
            return "score"
        if share < self.min_area:
            return "small"
        return "large" if share > self.max_area else None


class Rejected(NamedTuple):
    """A region that is not good enough."""

    region: Region
    reason: Reason


@dataclass(frozen=True)
class Extracted:
    """A query with the regions that were found, how that went, what was not good enough, and what went wrong."""

    query: Query
    outcome: Outcome
    rejected: tuple[Rejected, ...] = ()
    note: str | None = None


@dataclass(frozen=True)
class Pipeline:
    """The models that extraction takes, and what it asks of regions.

    Args:
        keep_known: leave queries alone that come with a region of their key objects; otherwise regions are made anew.
    """

    describer: Describer
    detector: Detector
    segmenter: Segmenter
    gates: RegionGates
    keep_known: bool = True

    def extract(self, batch: Sequence[RawQuery]) -> list[Extracted]:
        """Regions for each query of a batch, in its order."""
        done = [self._without_models(raw) for raw in batch]
        open_rows = [i for i, extracted in enumerate(done) if extracted is None]
        described = self._describe([batch[i] for i in open_rows])
        detected = self._detect([batch[i] for i in open_rows], described)
        masks = self._segment([batch[i] for i in open_rows], detected)
        for i, description, boxes, outlines in zip(open_rows, described, detected, masks, strict=True):
            done[i] = self._result(batch[i].query, description, boxes, outlines)
        return [extracted for extracted in done if extracted is not None]

    def _without_models(self, raw: RawQuery) -> Extracted | None:
        """What can be told without looking at the image; None: nothing."""
        if raw.image is None:
            return Extracted(replace(raw.query, regions=()), "unreadable", note=raw.problem)
        query = raw.query
        if self.keep_known and any(is_evidence(query, r.label) for r in query.regions):
            return Extracted(query, "known")
        return None

    def _describe(self, batch: Sequence[RawQuery]) -> list[Description]:
        """The phrases of each query: its own `objects`, where it has them, except for what is absent."""
        described = self.describer.describe([r.query for r in batch], [_pixels(r) for r in batch])
        merged = []
        for raw, description in zip(batch, described, strict=True):
            if raw.query.objects:
                absent = tuple(
                    o for o in raw.query.objects if any(same_phrase(o, a) for a in description.absent)
                )
                present = tuple(o for o in raw.query.objects if o not in absent)
                description = Description(present, absent)
            merged.append(description)
        return merged

    def _detect(self, batch: Sequence[RawQuery], described: Sequence[Description]) -> list[list[Detection]]:
        rows = [i for i, description in enumerate(described) if description.objects]
        found = self.detector.detect([_pixels(batch[i]) for i in rows], [described[i].objects for i in rows])
        detected: list[list[Detection]] = [[] for _ in batch]
        for i, boxes in zip(rows, found, strict=True):
            detected[i] = boxes
        return detected

    def _segment(
        self, batch: Sequence[RawQuery], detected: Sequence[Sequence[Detection]]
    ) -> list[np.ndarray]:
        """The mask of every box, bool [boxes, H, W] a query. An image that several queries are about is encoded once."""
        images = {r.query.image: _pixels(r) for r, boxes in zip(batch, detected, strict=True) if boxes}
        boxes = {
            name: [
                d.box for r, row in zip(batch, detected, strict=True) if r.query.image == name for d in row
            ]
            for name in images
        }
        segmented = self.segmenter.segment(list(images.values()), list(boxes.values()))
        remaining = dict(zip(images, segmented, strict=True))
        masks = []
        for raw, row in zip(batch, detected, strict=True):
            own = remaining.get(raw.query.image, np.zeros((0, 0, 0), dtype=bool))
            masks.append(own[: len(row)])
            remaining[raw.query.image] = own[len(row) :]
        return masks

    def _result(
        self, query: Query, description: Description, boxes: Sequence[Detection], masks: np.ndarray
    ) -> Extracted:
        named = replace(query, objects=(*description.objects, *description.absent))
        kept = () if not self.keep_known else query.regions
        if not description.objects:
            outcome: Outcome = "absent" if description.absent else "no phrase"
            return Extracted(replace(named, regions=kept), outcome)
        found: list[Region] = []
        rejected: list[Rejected] = []
        for phrase in description.objects:
            own = [i for i, d in enumerate(boxes) if d.label == phrase]
            if own:
                region, reason = self._judged(phrase, [boxes[i] for i in own], masks[own])
                if reason is None:
                    found.append(region)
                else:
                    rejected.append(Rejected(region, reason))
        outcome = "found" if found else "rejected" if rejected else "not detected"
        return Extracted(replace(named, regions=(*found, *kept)), outcome, tuple(rejected))

    def _judged(
        self, phrase: str, boxes: Sequence[Detection], masks: np.ndarray
    ) -> tuple[Region, Reason | None]:
        """The union of all instances of a phrase, and why it is not used, if it is not."""
        score = min(1.0, max(d.score for d in boxes))
        touching = [m for d, m in zip(boxes, masks, strict=True) if _touches(m, d)]
        if not touching:
            best = max(boxes, key=lambda d: d.score)
            return Region(phrase, best.box, None, score), "empty"
        mask = np.logical_or.reduce(touching)
        box = bounding_box(mask)
        corners = (float(box.left), float(box.top), float(box.right), float(box.bottom))
        region = Region(phrase, corners, mask_to_rle(mask), score)
        return region, self.gates.reason(score, float(mask.mean()))


def _pixels(raw: RawQuery) -> np.ndarray:
    assert raw.image is not None
    return raw.image


def _touches(mask: np.ndarray, detection: Detection) -> bool:
    """Whether a pixel of the mask lies in the box, at least in part."""
    x0, y0, x1, y1 = detection.box
    return bool(mask[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))].any())
