"""Region extraction for a batch of queries: describe, detect, segment, unite instances, and check each region."""

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
    """A region that failed a check."""

    region: Region
    reason: Reason


@dataclass(frozen=True)
class Extracted:
    """A query with its regions, the outcome of its extraction, its rejected regions, and why its image is unreadable."""

    query: Query
    outcome: Outcome
    rejected: tuple[Rejected, ...] = ()
    note: str | None = None


@dataclass(frozen=True)
class Pipeline:
    """The models of region extraction, the limits on regions, and whether known regions of key objects are kept."""

    describer: Describer
    detector: Detector
    segmenter: Segmenter
    gates: RegionGates
    keep_known: bool = True

    def extract(self, batch: Sequence[RawQuery]) -> list[Extracted]:
        """Extract regions for each query of a batch, in order."""
        ready = [self._without_models(raw) for raw in batch]
        rows = [raw for raw, result in zip(batch, ready, strict=True) if result is None]
        described = self._describe(rows)
        detected = self._detect(rows, described)
        segmented = self._segment(rows, detected)
        queries = [raw.query for raw in rows]
        extracted = map(self._result, queries, described, detected, segmented)
        return [result or next(extracted) for result in ready]

    def _without_models(self, raw: RawQuery) -> Extracted | None:
        """The result for an unreadable image, and for a query that comes with the regions of its key objects."""
        query, labels = raw.query, [region.label for region in raw.query.regions]
        if raw.image is None:
            return Extracted(replace(query, regions=()), "unreadable", note=raw.problem)
        has_evidence = any(is_evidence(query, label) for label in labels)
        is_known = self.keep_known and has_evidence and not unlocated_objects(query, labels)
        return Extracted(query, "known") if is_known else None

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
        by_row = dict(zip(rows, self.detector.detect(images, phrases), strict=True))
        return [by_row.get(i, []) for i in range(len(batch))]

    def _segment(
        self, batch: Sequence[RawQuery], detected: Sequence[Sequence[Detection]]
    ) -> list[np.ndarray]:
        """The masks of all boxes, bool [boxes, H, W] per query. An image shared by several queries is encoded once."""
        by_image: dict[str, list[int]] = {}
        for i, boxes in enumerate(detected):
            if boxes:
                by_image.setdefault(batch[i].query.image, []).append(i)
        images = [_pixels(batch[rows[0]]) for rows in by_image.values()]
        boxes_of = [[d.box for i in rows for d in detected[i]] for rows in by_image.values()]
        masks = [np.zeros((0, 0, 0), dtype=bool) for _ in batch]
        for rows, segmented in zip(by_image.values(), self.segmenter.segment(images, boxes_of), strict=True):
            ends = np.cumsum([len(detected[i]) for i in rows])
            for i, own in zip(rows, np.split(segmented, ends[:-1]), strict=True):
                masks[i] = own
        return masks

    def _result(
        self, query: Query, description: Description, boxes: Sequence[Detection], masks: np.ndarray
    ) -> Extracted:
        objects = (*description.objects, *description.absent)
        known = query.regions if self.keep_known else ()
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
        outcome: Outcome = "found" if regions else "rejected" if rejected else "not detected"
        if not description.objects:
            outcome = "absent" if description.absent else "no phrase"
        named = replace(query, objects=objects, absent=description.absent, regions=(*regions, *known))
        return Extracted(named, outcome, tuple(rejected))

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
