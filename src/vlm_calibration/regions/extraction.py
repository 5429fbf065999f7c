"""Region extraction for a batch of queries: describe, detect, segment, unite instances, and check each region.

The result for a query contains its regions or the reason why it has none, and the regions that failed a check. It depends
on the batch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np

from vlm_calibration.data.regions import RawQuery
from vlm_calibration.perturbation.masks import bounding_box, mask_to_rle
from vlm_calibration.records import DataError, Query, Region
from vlm_calibration.regions.describer import Describer, Description
from vlm_calibration.regions.detector import Detection, Detector
from vlm_calibration.regions.segmenter import Segmenter
from vlm_calibration.text.labels import is_evidence, unlocated_objects
from vlm_calibration.text.matching import same_phrase

Outcome = Literal["found", "known", "absent", "no phrase", "not detected", "rejected", "unreadable"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)
"""found: at least one region passed the checks. known: the query came with regions. absent: all objects are absent
according to the answer. no phrase: the describer named no object. not detected: no box. rejected: no region passed the
checks. unreadable: the image cannot be read."""

Reason = Literal["score", "small", "large", "empty"]
"""Why a region is rejected: its score, its share of the image (small, large), or a mask without a pixel in its box."""


@dataclass(frozen=True)
class RegionGates:
    """Limits that a region must meet to be used.

    Args:
        min_score: minimum score of its best box, in [0, 1].
        min_area: minimum share of the image, in [0, 1]; noise on a smaller region is not visible.
        max_area: maximum share of the image, in [0, 1]; a larger region leaves no clean context.
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
        """Why a region with this score and share of the image is rejected; None if it passes."""
        if score < self.min_score:
            return "score"
        if share < self.min_area:
            return "small"
        return "large" if share > self.max_area else None


class Rejected(NamedTuple):
    """A region that failed a check.

    Attributes:
        region: the region.
        reason: the failed check.
    """

    region: Region
    reason: Reason


@dataclass(frozen=True)
class Extracted:
    """The result of extraction for one query.

    Attributes:
        query: the query with its regions.
        outcome: see `OUTCOMES`.
        rejected: regions that failed a check.
        note: the error message of an unreadable image.
    """

    query: Query
    outcome: Outcome
    rejected: tuple[Rejected, ...] = ()
    note: str | None = None


@dataclass(frozen=True)
class Pipeline:
    """The models of region extraction and the limits on regions.

    Args:
        describer: names the key objects.
        detector: finds their boxes.
        segmenter: turns boxes into masks.
        gates: limits that a region must meet.
        keep_known: keep the regions of a query that comes with a region of its key objects; otherwise extract them again.
    """

    describer: Describer
    detector: Detector
    segmenter: Segmenter
    gates: RegionGates
    keep_known: bool = True

    def extract(self, batch: Sequence[RawQuery]) -> list[Extracted]:
        """Extract regions for each query of a batch, in order."""
        results = [self._result_without_models(raw) for raw in batch]
        pending = [i for i, result in enumerate(results) if result is None]
        rows = [batch[i] for i in pending]
        described = self._describe(rows)
        detected = self._detect(rows, described)
        masks = self._segment(rows, detected)
        for i, description, boxes, outlines in zip(pending, described, detected, masks, strict=True):
            results[i] = self._result(batch[i].query, description, boxes, outlines)
        return [result for result in results if result is not None]

    def _result_without_models(self, raw: RawQuery) -> Extracted | None:
        """The result for a query whose image is unreadable or whose regions are known; None for all others."""
        if raw.image is None:
            return Extracted(replace(raw.query, regions=()), "unreadable", note=raw.problem)
        query, labels = raw.query, [r.label for r in raw.query.regions]
        has_all = not unlocated_objects(query, labels)
        if self.keep_known and has_all and any(is_evidence(query, label) for label in labels):
            return Extracted(query, "known")
        return None

    def _describe(self, batch: Sequence[RawQuery]) -> list[Description]:
        """The phrases of each query. A query's own `objects` and `absent` replace the describer's."""
        described = self.describer.describe([r.query for r in batch], [_pixels(r) for r in batch])
        merged = []
        for raw, description in zip(batch, described, strict=True):
            query, absent = raw.query, raw.query.absent or description.absent
            if own := (*query.objects, *(o for o in query.absent if o not in query.objects)):
                missing = tuple(o for o in own if any(same_phrase(o, a) for a in absent))
                description = Description(tuple(o for o in own if o not in missing), missing)
            merged.append(description)
        return merged

    def _detect(self, batch: Sequence[RawQuery], described: Sequence[Description]) -> list[list[Detection]]:
        rows = [i for i, description in enumerate(described) if description.objects]
        images, phrases = [_pixels(batch[i]) for i in rows], [described[i].objects for i in rows]
        detected: list[list[Detection]] = [[] for _ in batch]
        for i, boxes in zip(rows, self.detector.detect(images, phrases), strict=True):
            detected[i] = boxes
        return detected

    def _segment(
        self, batch: Sequence[RawQuery], detected: Sequence[Sequence[Detection]]
    ) -> list[np.ndarray]:
        """The masks of all boxes, bool [boxes, H, W] per query. An image shared by several queries is encoded once."""
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
        objects = (*description.objects, *description.absent)
        named = replace(query, objects=objects, absent=description.absent)
        known = query.regions if self.keep_known else ()
        if not description.objects:
            outcome: Outcome = "absent" if description.absent else "no phrase"
            return Extracted(replace(named, regions=known), outcome)
        regions: list[Region] = []
        rejected: list[Rejected] = []
        for phrase in description.objects:
            own = [i for i, d in enumerate(boxes) if d.label == phrase]
            if own:
                region, reason = self._unite(phrase, [boxes[i] for i in own], masks[own])
                if reason is None:
                    regions.append(region)
                else:
                    rejected.append(Rejected(region, reason))
        outcome = "found" if regions else "rejected" if rejected else "not detected"
        return Extracted(replace(named, regions=(*regions, *known)), outcome, tuple(rejected))

    def _unite(
        self, phrase: str, boxes: Sequence[Detection], masks: np.ndarray
    ) -> tuple[Region, Reason | None]:
        """The union of all instances of a phrase, and the reason if it is rejected."""
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
    """Whether the mask has a pixel that overlaps the box."""
    x0, y0, x1, y1 = detection.box
    return bool(mask[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))].any())
