"""Region extraction as a LightningModule."""

from __future__ import annotations

from typing import Literal

import lightning as L

from vlm_calibration.data.module import DataNeeds
from vlm_calibration.data.regions import RawBatch
from vlm_calibration.records import DataError
from vlm_calibration.regions.describer import Describer
from vlm_calibration.regions.detector import Detector
from vlm_calibration.regions.extraction import Extracted, Pipeline, RegionGates
from vlm_calibration.regions.segmenter import Segmenter
from vlm_calibration.stages.training import device_of


class RegionExtractor(L.LightningModule):
    """Finds the regions of the key objects of queries: m = SAM(v0, GroundingDINO(v0, M_desc(q, r))).

    Args:
        describer: names the key objects; the `objects` of a query take precedence.
        detector: finds a box for each name.
        segmenter: outlines the object in each box.
        gates: conditions that a region must meet.
        keep_known: keep the regions of queries that already have one of their key objects; False: extract all again.
        on_bad_image: "raise" stops at the first unreadable image; "skip" records it and continues.
    """

    run_digest: str | None = None
    """Of the record of this run, whose shards it resumes from; None: it does not resume."""

    def __init__(
        self,
        describer: Describer,
        detector: Detector,
        segmenter: Segmenter,
        gates: RegionGates = RegionGates(),  # noqa: B008  (frozen)
        keep_known: bool = True,
        on_bad_image: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__()
        self.pipeline = Pipeline(describer, detector, segmenter, gates, keep_known)
        self.keep_known = keep_known
        self.data_needs = DataNeeds(keep_known=keep_known)
        self.on_bad_image = on_bad_image

    def configure_model(self) -> None:
        parts = (self.pipeline.describer, self.pipeline.detector, self.pipeline.segmenter)
        for part in parts if self.trainer.datamodule.pending_shards else ():  # type: ignore[attr-defined]
            part.load(device_of(self))

    def predict_step(self, batch: RawBatch, batch_idx: int) -> list[Extracted]:
        problems = [row.problem for row in batch.rows if row.problem is not None]
        if self.on_bad_image == "raise" and problems:
            raise DataError(problems[0])
        return self.pipeline.extract(batch.rows) if batch.rows else []
