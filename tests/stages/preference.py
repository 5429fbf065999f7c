"""What the tests of stages share: types of fixtures, the noise of their data, and callbacks that record or stop a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.training import trained_parameters

MakeModule = Callable[..., DPOModule]
Data = Callable[..., PerturbedQueryDataModule]
MakeTrainer = Callable[..., L.Trainer]
Evaluate = Callable[..., EvaluationModule]
NewAdapter = Callable[..., str]
LoadModel = Callable[..., Any]
LEVELS = (1.0, 0.75, 0.5, 0.25, 0.0)
GOLD, OWN = CandidateSettings(), CandidateSettings(answers="own")
WITH_OPPOSITE = CandidateSettings(answers="own", wrong_answer=True)
NOISE = NoisePolicy(levels=LinearLevels(n_levels=5), distractor_probability=0.0, wrong_answer_rate=1.0)
"""Five levels, and wrong responses among the correct ones."""


class Steps(L.Callback):
    """Keeps the loss and the gradient of each optimiser step, and the metrics of each validation."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[Tensor] = []
        self.validated: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer: Any, module: Any, *_: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in trained_parameters(module)]))

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validated.append({k: float(v) for k, v in trainer.callback_metrics.items()})


class Stop(L.Callback):
    """Raises an error, or the exception of Ctrl-C, before a batch."""

    def __init__(self, batch: int, error: type[BaseException], loader: int = 0) -> None:
        self.place = (batch, loader)
        self.error = error

    def on_test_batch_start(self, *args: Any) -> None:
        if (args[3], args[4] if len(args) > 4 else 0) == self.place:
            raise self.error


def adapter_weights(module: DPOModule, name: str) -> dict[str, Tensor]:
    """Weights of one adapter, named as in its file."""
    return {
        key.removeprefix("model.").replace(f".{name}.", "."): p.detach().clone()
        for key, p in module.named_parameters()
        if f".{name}." in key
    }
