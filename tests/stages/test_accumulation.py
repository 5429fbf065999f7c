"""Accumulated batches are one large batch, and a compiled layer gives the same: losses and gradients of both stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.losses.distribution import SoftLabel
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.stages.preference_targets import PairPolicy
from vlm_calibration.stages.sft import SFTModule

from .preference import NOISE, Data, MakeModule, MakeTrainer, Steps

Module = SFTModule | Any
Run = Callable[..., tuple[list[float], Tensor]]


def configured(stage: str, demo_folder: str, make_module: MakeModule) -> Module:
    """A stage with its model; stage 2 has a loss of all candidates, which share their prefix, and all further terms."""
    if stage == "stage 1":
        torch.manual_seed(0)
        lora = LoraSettings(r=4, alpha=8, dropout=0.0)
        module: Module = SFTModule(BaseModel(demo_folder, dtype="float32"), lora, answer_weight="confidence")
    else:
        module = make_module(
            loss=SoftLabel(width=0.05),
            pairs=PairPolicy(target="expected"),
            scoring="shared",
            nll_weight=0.3,
            drift_weight=1.0,
        )
    module.configure_model()
    return module


@pytest.fixture
def run(demo_folder: str, make_module: MakeModule, data: Data, trainer: MakeTrainer) -> Run:
    """Trains on the same six queries; returns the loss of each batch and the gradient of the step."""

    def run(
        stage: str, batch_size: int = 6, accumulated: int = 1, prepare: Callable[[Module], None] | None = None
    ) -> tuple[list[float], Tensor]:
        module, seen = configured(stage, demo_folder, make_module), Steps()
        if prepare is not None:
            prepare(module)
        answers = None if stage == "stage 1" else CandidateSettings(answers="own")
        queries = data(
            train=DemoSource("train", scenes=2), noise=NOISE, candidates=answers, batch_size=batch_size
        )
        settings = {"max_epochs": 1, "limit_val_batches": 0, "accumulate_grad_batches": accumulated}
        trainer(seen, **settings).fit(module, datamodule=queries)
        (gradient,) = seen.gradients
        return seen.losses, gradient

    return run


def compile_layer(module: Module) -> None:
    """As the README says, with the compiler's own graphs but without its code generator, which takes minutes; one layer of all."""
    torch.compiler.reset()
    unwrap_peft(module.model).get_decoder().layers[0].compile(backend="aot_eager", dynamic=True)


@pytest.mark.parametrize("stage", ["stage 1", "own answers"])
def test_accumulated_batches_are_one_large_batch(run: Run, stage: str) -> None:
    (loss,), large = run(stage)
    losses, accumulated = run(stage, batch_size=3, accumulated=2)
    assert len(losses) == 2
    assert losses[0] != pytest.approx(losses[1], rel=1e-3), "two different halves"
    # Lightning has divided them by the number of batches.
    assert sum(losses) == pytest.approx(loss, rel=1e-5)
    assert float((large - accumulated).norm()) < 1e-6 * max(1.0, float(large.norm()))
    assert float(large.norm()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage 1", pytest.param("own answers", marks=pytest.mark.nightly)])
def test_a_compiled_layer_trains_the_same(run: Run, stage: str) -> None:
    (loss,), eager = run(stage)
    torch._dynamo.utils.counters.clear()
    (compiled_loss,), compiled = run(stage, prepare=compile_layer)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "a layer was compiled"
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert float((eager - compiled).norm()) < 1e-5 * max(1.0, float(eager.norm()))
