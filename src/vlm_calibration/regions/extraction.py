"""Region extraction for a batch of queries: describe, detect, segment, unite instances, and check each region."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from vlm_calibration.data.regions import RawQuery
from vlm_calibration.perturbation.masks import bounding_box, mask_to_rle
from vlm_calibration.records import DataError, Query, Region
from vlm_calibration.regions.describer import Describer, Description
from vlm_calibration.regions.detector import Box, Detection, Detector
from vlm_calibration.regions.segmenter import Segmenter
from vlm_calibration.text.labels import is_evidence, unlocated_objects
from vlm_calibration.text.matching import same_phrase

Outcome = Literal["found", "known", "absent", "no phrase", "not detected", "rejected", "unreadable"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)
"""found: at least one region passed the checks. known: the query came with regions. absent: all objects are absent
according to the answer. no phrase: the describer named no object. not detected: no box. rejected: no region passed the
checks. unreadable: the image cannot be read."""

Instance = tuple[Detection, np.ndarray]  # a box with its mask, bool [H, W]

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
            needed = "0 <= min_score <= 1 and 0 <= min_area <= max_area <= 1"
            raise DataError(f"gates: needs {needed}, found {self}")

    def reason(self, score: float, share: float) -> Reason | None:
        if score < self.min_score:
            return "score"
        return "small" if share < self.min_area else "large" if share > self.max_area else None


@dataclass(frozen=True)
class Extracted:
    """A query with its regions, the outcome of its extraction, its rejected regions and why, and why its image is unreadable."""

    query: Query
    outcome: Outcome
    rejected: tuple[tuple[Region, Reason], ...] = ()
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
        queries = [raw.query for raw in rows]
        images = [raw.image for raw in rows if raw.image is not None]  # of each row
        described = self._describe(queries, images)
        named = [(image, d.objects) for image, d in zip(images, described, strict=True) if d.objects]
        detections = iter(self.detector.detect([image for image, _ in named], [names for _, names in named]))
        detected = [next(detections) if d.objects else [] for d in described]
        extracted = map(self._result, queries, described, self._segment(queries, images, detected))
        return [result or next(extracted) for result in ready]

    def _without_models(self, raw: RawQuery) -> Extracted | None:
        """The result for an unreadable image, and for a query that comes with the regions of its key objects."""
        query, labels = raw.query, [region.label for region in raw.query.regions]
        if raw.image is None:
            return Extracted(replace(query, regions=()), "unreadable", note=raw.problem)
        has_evidence = any(is_evidence(query, label) for label in labels)
        is_known = self.keep_known and has_evidence and not unlocated_objects(query, labels)
        return Extracted(query, "known") if is_known else None

    def _describe(self, queries: Sequence[Query], images: Sequence[np.ndarray]) -> list[Description]:
        """The phrases of each query. A query's own `objects` and `absent` replace the describer's."""
        merged = []
        for query, description in zip(queries, self.describer.describe(queries, images), strict=True):
            absent = query.absent or description.absent
            if own := (*query.objects, *(o for o in query.absent if o not in query.objects)):
                missing = tuple(o for o in own if any(same_phrase(o, a) for a in absent))
                description = Description(tuple(o for o in own if o not in missing), missing)
            merged.append(description)
        return merged

    def _segment(
        self, queries: Sequence[Query], images: Sequence[np.ndarray], detected: Sequence[Sequence[Detection]]
    ) -> list[list[Instance]]:
        """The boxes of each query with their masks. An image shared by several queries is encoded once."""
        images_of: dict[str, np.ndarray] = {}
        boxes_of: dict[str, list[Box]] = {}
        for query, image, boxes in zip(queries, images, detected, strict=True):
            if boxes:
                images_of[query.image] = image
                boxes_of.setdefault(query.image, []).extend(d.box for d in boxes)
        segmented = self.segmenter.segment(list(images_of.values()), list(boxes_of.values()))
        masks = dict(zip(boxes_of, map(iter, segmented), strict=True))
        pairs = zip(queries, detected, strict=True)
        return [[(box, next(masks[query.image])) for box in boxes] for query, boxes in pairs]

    def _result(self, query: Query, description: Description, instances: Sequence[Instance]) -> Extracted:
        """Unite the instances of each phrase, and check the regions."""
        by_phrase = ([i for i in instances if i[0].label == phrase] for phrase in description.objects)
        united = [self._unite(of_phrase) for of_phrase in by_phrase if of_phrase]
        regions = tuple(region for region, reason in united if reason is None)
        rejected = tuple((region, reason) for region, reason in united if reason is not None)
        outcome: Outcome = "found" if regions else "rejected" if rejected else "not detected"
        if not description.objects:
            outcome = "absent" if description.absent else "no phrase"
        objects, absent = (*description.objects, *description.absent), description.absent
        known = query.regions if self.keep_known else ()
        named = replace(query, objects=objects, absent=absent, regions=(*regions, *known))
        return Extracted(named, outcome, rejected)

    def _unite(self, instances: Sequence[Instance]) -> tuple[Region, Reason | None]:
        """The union of these instances of a phrase, and the reason if it is rejected."""
        best = max((detection for detection, _ in instances), key=lambda d: d.score)
        score = min(1.0, best.score)
        touching = []  # the masks with a pixel in their box
        for detection, mask in instances:
            x0, y0, x1, y1 = detection.box
            if mask[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))].any():
                touching.append(mask)
        if not touching:
            return Region(best.label, best.box, None, score), "empty"
        mask = np.logical_or.reduce(touching)
        box = bounding_box(mask)
        corners = (float(box.left), float(box.top), float(box.right), float(box.bottom))
        region = Region(best.label, corners, mask_to_rle(mask), score)
        return region, self.gates.reason(score, float(mask.mean()))
