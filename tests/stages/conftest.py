"""Runs of a few steps of the tiny model on a few scenes, through the real Trainer, and callbacks that record or stop them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.teacher import FittedTeacher, TeacherSettings
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import OptimizerSettings, trained_parameters

from ..level_tables import measured
from ..trainers import plain_trainer
from .own import MAPS, MakeStep, OwnStep

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


@pytest.fixture
def trainer(tmp_path: Path) -> MakeTrainer:
    def make(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
        return plain_trainer(tmp_path / "run", *callbacks, **settings)

    return make


@pytest.fixture(scope="session")
def data(model_folder: str) -> Data:
    """Nine training queries, three for validation, and a test split of three parts of which one is noised."""

    def make(**settings: Any) -> PerturbedQueryDataModule:
        plain = {
            "train": DemoSource("train", scenes=3),
            "validation": DemoSource("calibration", scenes=1),
            "test": {
                "clean": EvalSplit(DemoSource("test", scenes=2)),
                "noised": EvalSplit(DemoSource("test", scenes=2), "drawn"),
                "shifted": EvalSplit(DemoSource("test", scenes=1, shifted=True)),
            },
            "noise": NoisePolicy(distractor_probability=0.0),
            "batch_size": 3,
            "eval_batch_size": 4,
            "workers": 0,
            "max_length": 300,
        }
        return PerturbedQueryDataModule(model_folder, **{**plain, **settings})  # type: ignore[arg-type]

    return make


@pytest.fixture
def run_evaluation(model_folder: str, data: Data, trainer: MakeTrainer, tmp_path: Path) -> Evaluate:
    """Evaluates the base model, adapters and the oracle; `trained` is for the Trainer, other settings are the module's."""
    measured(model_folder).save(tmp_path / "levels.json")

    def run(
        adapters: dict[str, str],
        *callbacks: L.Callback,
        queries: PerturbedQueryDataModule | None = None,
        trained: dict[str, Any] | None = None,
        **model: Any,
    ) -> EvaluationModule:
        settings = {"oracle_levels": str(tmp_path / "levels.json"), "max_new_tokens": 5, **model}
        module = EvaluationModule(BaseModel(model_folder, dtype="float32"), adapters, **settings)
        module.run_digest = "of these settings"
        run = trainer(*callbacks, PredictionWriter(), **(trained or {}))
        run.test(module, datamodule=queries or data(), verbose=False)
        return module

    return run


@pytest.fixture(scope="session")
def demo_folder(root: Path) -> str:
    """The demo model as shipped, which can answer questions about the scenes."""
    return str(root / "src" / "vlm_calibration" / "demo" / "model")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, demo_folder: str) -> str:
    """A short stage 1: the demo model still answers, and spreads its confidence over the levels."""
    L.seed_everything(0)
    sft = SFTModule(
        BaseModel(demo_folder, dtype="float32"),
        LoraSettings(r=4, alpha=8, dropout=0.0),
        OptimizerSettings(lr=5e-3),
    )
    queries = PerturbedQueryDataModule(
        demo_folder, train=DemoSource("train", scenes=100), noise=NOISE, batch_size=12, workers=0
    )
    folder = tmp_path_factory.mktemp("stage-1")
    plain_trainer(folder, max_steps=25, limit_val_batches=0).fit(sft, datamodule=queries)
    sft.model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_module(demo_folder: str, adapter: str) -> MakeModule:
    def make(folder: str | None = adapter, **settings: Any) -> DPOModule:
        plain = {"max_new_tokens": 8, "optimizer": OptimizerSettings(lr=3e-3)}
        return DPOModule(BaseModel(demo_folder, dtype="float32"), folder, **{**plain, **settings})

    return make


@pytest.fixture
def candidates(data: Data) -> Data:
    """As `data`, with candidates at five levels."""

    def make(candidates: CandidateSettings | None = GOLD, **settings: Any) -> Any:
        return data(**{"noise": NOISE, "candidates": candidates, **settings})

    return make


@pytest.fixture
def make_step(make_module: MakeModule, candidates: Data, monkeypatch: pytest.MonkeyPatch) -> MakeStep:
    """Function that builds a step of some queries; `data` are settings of the data, all others of the module."""

    def make(
        answers: CandidateSettings = GOLD,
        n: int = 6,
        moved: float = 0.03,
        data: dict[str, Any] | None = None,
        **settings: Any,
    ) -> OwnStep:
        module = make_module(**settings)
        if module.pairs.target == "fitted":
            module.target.fitted = FittedTeacher(TeacherSettings(), MAPS, {})
        return OwnStep(module, candidates(answers, **(data or {})), monkeypatch, n, moved)

    return make
