"""Accumulated batches are one large batch, and a compiled layer gives the same: losses and gradients of both stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vlm_calibration.data.noise import Sample
from vlm_calibration.losses.distribution import SoftLabel
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.stages.preference_targets import PairPolicy
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import TrainingStage, trained_parameters

from .own import MakeStep
from .preference import NOISE, OWN, Data

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
