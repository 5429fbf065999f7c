"""Region extraction as a LightningModule: devices, processes, precision and the progress bar come from the Trainer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import lightning as L

from vlm_calibration.data.raw import RawBatch
from vlm_calibration.records import DataError
from vlm_calibration.regions.describer import Describer
from vlm_calibration.regions.detector import Detector
from vlm_calibration.regions.extraction import Extracted, Pipeline, RegionGates
from vlm_calibration.regions.segmenter import Segmenter
from vlm_calibration.stages.answering import device_of


class RegionExtractor(L.LightningModule):
    """Finds where the key objects of queries are: m = SAM(v0, GroundingDINO(v0, M_desc(q, r))).

    Args:
        describer: names the key objects. A query that comes with `objects` keeps those.
        detector: finds boxes for their names.
        segmenter: outlines what is in the boxes.
        gates: what a region must be like to be used.
        keep_known: leave queries alone that come with a region of their key objects; otherwise regions are made anew.
        on_bad_image: "raise" stops at the first image that cannot be read; "skip" notes it and goes on.
    """

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
        self.on_bad_image = on_bad_image

    def settings(self) -> dict[str, Any]:
        """What the regions depend on, as plain values."""
        pipeline = self.pipeline
        return {
            "describer": pipeline.describer.settings(),
            "detector": pipeline.detector.settings(),
            "segmenter": pipeline.segmenter.settings(),
            "gates": asdict(pipeline.gates),
            "keep_known": pipeline.keep_known,
            "precision": str(self.trainer.precision),
        }

    def configure_model(self) -> None:
        for part in (self.pipeline.describer, self.pipeline.detector, self.pipeline.segmenter):
            part.load(device_of(self))

    def predict_step(self, batch: RawBatch, batch_idx: int) -> list[Extracted]:
        if self.on_bad_image == "raise":
            for row in batch.rows:
                if row.problem is not None:
                    raise DataError(row.problem)
        return self.pipeline.extract(batch.rows)
