"""What both training stages share: AdamW and its learning rate schedule, and what sharded weights cannot do."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch

from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.records import DataError
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.level_fit import LevelFitModule
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import OptimizerSettings, adamw_with_schedule, learning_rate_factor

from .preference import Data, MakeTrainer


def test_warm_up_then_cosine() -> None:
    settings = OptimizerSettings(warmup_fraction=0.2, final_fraction=0.1)
    factors = [learning_rate_factor(step, 100, settings) for step in range(101)]
    assert factors[:20] == pytest.approx([(s + 1) / 21 for s in range(20)])
    assert factors[20] == 1.0
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[100] == pytest.approx(0.1)
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert learning_rate_factor(500, 100, settings) == pytest.approx(0.1), "it stays there after the end"


def test_every_step_of_a_short_run_trains() -> None:
    for warmup in (0.0, 0.05, 0.5, 0.99):
        settings = OptimizerSettings(warmup_fraction=warmup)
        for total in (1, 2, 3, 10):
            assert all(0 < learning_rate_factor(step, total, settings) <= 1 for step in range(total))


def test_settings_reach_adamw() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    settings = OptimizerSettings(lr=0.5, weight_decay=0.1, betas=(0.5, 0.6), eps=1e-3, warmup_fraction=0.0)
    configured = adamw_with_schedule([parameter], settings, 4)
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    [group] = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group[k] for k in ("weight_decay", "betas", "eps")] == [0.1, (0.5, 0.6), 1e-3]
    rates = []
    for _ in range(4):
        rates.append(group["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5 * (0.5 + 0.5 * math.cos(math.pi * i / 4)) for i in range(4)])


@pytest.mark.parametrize(
    ("name", "value"),
    [("warmup_fraction", 1.0), ("final_fraction", math.nan), ("lr", 0.0), ("weight_decay", -0.1)],
)
def test_numbers_outside_their_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(DataError, match=rf"{name} .*found {value}"):
        OptimizerSettings(**{name: value})


def _sharded(stage: type[L.LightningModule], quantization: Any = "none", **settings: Any) -> Any:
    """A stage whose trainer's strategy shards weights."""
    module = stage(base=BaseModel("there/is/no/such/model", quantization=quantization), **settings)
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
    plain = {"limit_val_batches": 0, "answers": "gold", "quantization": "none", "scoring": "shared"}
    given = {**plain, **settings}
    module = _sharded(DPOModule, given["quantization"], scoring=given["scoring"], reference="base")
    module.trainer = trainer(limit_val_batches=given["limit_val_batches"])
    module.trainer.datamodule = data(candidates=CandidateSettings(answers=given["answers"]))
    with pytest.raises(DataError, match=culprit):
        module.setup("fit")


def test_a_process_without_samples_ends_training(trainer: MakeTrainer) -> None:
    module = _sharded(SFTModule)
    module.trainer = trainer()
    assert module.has_samples(SimpleNamespace(inputs={"input_ids": 1}))
    with pytest.raises(DataError, match="FSDP2 needs a sample of each process"):
        module.has_samples(SimpleNamespace(inputs={}))
