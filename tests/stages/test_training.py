"""What both training stages share: AdamW with its schedule, accumulated batches, compiled layers, and what sharded weights cannot do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import lightning as L
import pytest
import torch
from torch import Tensor

from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.data.noise import Sample
from vlm_calibration.losses.distribution import SoftLabel
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.records import DataError
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.level_fit import LevelFitModule
from vlm_calibration.stages.preference_targets import PairPolicy
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import (
    OptimizerSettings,
    TrainingStage,
    adamw_with_schedule,
    learning_rate_factor,
    trained_parameters,
)

from .conftest import NOISE, OWN, Data, MakeTrainer
from .own import MakeStep


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


# --- Accumulated batches and compiled layers ---

STAGES = ("stage 1", "own answers")


class Stage(NamedTuple):
    """A stage outside a Trainer, with its model, and six samples to collate."""

    module: TrainingStage
    collate: Callable[[Sequence[Sample]], Any]
    samples: list[Sample]

    def train(self, *parts: slice) -> tuple[list[float], Tensor]:
        """The loss of each batch, and the mean of their gradients."""
        self.module.zero_grad(set_to_none=True)
        losses = [self.module.training_step(self.collate(self.samples[part]), 0) for part in parts]
        torch.stack(losses).mean().backward()
        gradients = [p.grad for p in trained_parameters(self.module)]
        return [float(loss) for loss in losses], torch.cat([g.flatten() for g in gradients if g is not None])


@pytest.fixture
def stage(
    request: pytest.FixtureRequest,
    demo_folder: str,
    make_step: MakeStep,
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
) -> Stage:
    """Stage 2 has a loss of all candidates, which share their prefix, and all further terms."""
    if request.param == "own answers":
        weights = {"nll_weight": 0.3, "drift_weight": 1.0}
        pairs = PairPolicy(target="expected")
        step = make_step(OWN, loss=SoftLabel(width=0.05), pairs=pairs, scoring="shared", **weights)
        return Stage(step.module, step.collate, step.samples)
    torch.manual_seed(0)
    lora = LoraSettings(r=4, alpha=8, dropout=0.0)
    module = SFTModule(BaseModel(demo_folder, dtype="float32"), lora, answer_weight="confidence")
    module.configure_model()
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    queries = data(noise=NOISE)
    queries.setup("fit")
    loader: Any = queries.train_dataloader()
    return Stage(module, loader.collate_fn.args[0], [loader.dataset[0, i] for i in range(6)])


@pytest.mark.parametrize("stage", STAGES, indirect=True)
def test_accumulated_batches_are_one_large_batch(stage: Stage) -> None:
    (loss,), large = stage.train(slice(6))
    (first, second), accumulated = stage.train(slice(3), slice(3, 6))
    assert first != pytest.approx(second, rel=1e-3), "two different halves"
    assert (first + second) / 2 == pytest.approx(loss, rel=1e-5)
    assert float((large - accumulated).norm()) < 1e-6 * max(1.0, float(large.norm()))
    assert float(large.norm()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [STAGES[0], pytest.param(STAGES[1], marks=pytest.mark.nightly)], indirect=True
)
def test_a_compiled_layer_trains_the_same(stage: Stage) -> None:
    """As the README says, with the compiler's own graphs but without its code generator, which takes minutes; one layer of all."""
    (loss,), eager = stage.train(slice(6))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    layer = unwrap_peft(stage.module.model).get_decoder().layers[0]
    layer.compile(backend="aot_eager", dynamic=True)
    (compiled_loss,), compiled = stage.train(slice(6))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "a layer was compiled"
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert float((eager - compiled).norm()) < 1e-5 * max(1.0, float(eager.norm()))


# --- Sharded weights ---


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
