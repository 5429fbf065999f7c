"""FSDP2 trains; what generates answers is refused before a model is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest

from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.records import DataError
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.level_fit import LevelFitModule
from vlm_calibration.stages.sft import SFTModule

from .preference import Data, MakeTrainer

MISSING = "there/is/no/such/model"


def _sharded(
    stage: type[L.LightningModule], quantization: str = "none", **settings: Any
) -> L.LightningModule:
    """A stage whose trainer's strategy shards weights."""
    module = stage(base=BaseModel(MISSING, quantization=quantization), **settings)  # type: ignore[arg-type]
    module._device_mesh = cast(Any, {})
    return module


@pytest.mark.parametrize(
    ("stage", "name"),
    [(EvaluationModule, "test"), (LevelFitModule, "test"), (SFTModule, "validate"), (DPOModule, "validate")],
)
def test_what_generates_answers_is_refused(stage: type[L.LightningModule], name: str) -> None:
    module = _sharded(stage, **({"reference": "base"} if stage is DPOModule else {}))
    with pytest.raises(DataError, match=r"^trainer\.strategy: FSDP2"):
        module.setup(name)


@pytest.mark.parametrize(
    ("culprit", "settings"),
    [
        ("trainer.limit_val_batches", {"limit_val_batches": 1.0}),
        ("model.init_args.base.quantization", {"quantization": "int8"}),
        ("data.candidates.answers", {"answers": "own"}),
        ("model.scoring", {"scoring": "auto"}),
    ],
)
def test_settings_of_training_are_refused(
    trainer: MakeTrainer, data: Data, culprit: str, settings: dict[str, Any]
) -> None:
    given = {
        "limit_val_batches": 0,
        "answers": "gold",
        "quantization": "none",
        "scoring": "shared",
        **settings,
    }
    module = _sharded(DPOModule, given["quantization"], scoring=given["scoring"], reference="base")
    module.trainer = trainer(limit_val_batches=given["limit_val_batches"])
    module.trainer.datamodule = data(candidates=CandidateSettings(answers=given["answers"]))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=culprit):
        module.setup("fit")


def test_a_process_without_samples_ends_training(trainer: MakeTrainer) -> None:
    module: Any = _sharded(SFTModule)
    module.trainer = trainer()
    assert module.has_samples(SimpleNamespace(inputs={"input_ids": 1}))
    with pytest.raises(DataError, match="FSDP2 needs a sample of each process"):
        module.has_samples(SimpleNamespace(inputs={}))
