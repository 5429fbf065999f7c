"""What the tests of stage 2 share: a module outside a Trainer, and a callback that records a run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from vlm_calibration.data.candidates import Candidate, CandidateBatch
from vlm_calibration.data.collate import IGNORE, ChatFormat, SFTCollator
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy, Sample
from vlm_calibration.models.adapters import using_adapter
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.training import trained_parameters

MakeModule = Callable[..., DPOModule]
Data = Callable[..., PerturbedQueryDataModule]
LEVELS = (1.0, 0.75, 0.5, 0.25, 0.0)
NOISE = NoisePolicy(levels=LinearLevels(n_levels=5), distractor_probability=0.0, wrong_answer_rate=1.0)
"""Five levels, and wrong responses among the correct ones."""


def outside_trainer(
    module: DPOModule,
    queries: PerturbedQueryDataModule,
    monkeypatch: pytest.MonkeyPatch,
    moved: float = 0.03,
) -> dict[str, float]:
    """Make a module and its data ready for steps without a Trainer, and return the dictionary of the values that it logs.

    Args:
        moved: how far the policy's weights are moved away from the reference's.
    """
    logged: dict[str, float] = {}
    module.configure_model()
    module.trainer = SimpleNamespace(datamodule=queries)  # type: ignore[assignment]
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(module):
            parameter += moved * torch.randn(parameter.shape, generator=generator)
    queries.setup("fit")
    return logged


class Observed:
    """A module outside a Trainer, the first samples of its data, and the values that it logs.

    The policy's weights are moved away from the reference's.
    """

    def __init__(
        self,
        module: DPOModule,
        queries: PerturbedQueryDataModule,
        monkeypatch: pytest.MonkeyPatch,
        n: int = 4,
    ) -> None:
        self.module = module
        self.logged = outside_trainer(module, queries, monkeypatch)
        dataset = queries.train_dataloader().dataset
        self.samples: list[Sample] = [dataset[0, i] for i in range(n)]
        self.chat: ChatFormat = queries.chat
        collator = queries.candidate_collator
        assert collator is not None
        self.batch: CandidateBatch = collator(self.samples)

    def step(self, batch: CandidateBatch | None = None) -> Tensor:
        return self.module.training_step(self.batch if batch is None else batch, 0)

    def compared(self) -> list[list[Candidate]]:
        with torch.no_grad():
            return [list(row) for row in self.module.choose(self.batch).compared]

    def by_token(self, row: int, candidate: Candidate, reference: bool = False) -> list[float]:
        """log p of a candidate's tokens, by a plain forward over the whole conversation."""
        sample, model = self.samples[row], self.module.model
        answer = sample.answer
        if candidate.wrong:
            text = self.chat.processor.tokenizer.decode(candidate.tokens[: candidate.answer_length])
            answer = text.strip().rstrip(".")
            assert answer in sample.wrong
        stated = sample._replace(confidence=candidate.confidence, wrong_answer=answer)
        batch = SFTCollator(self.chat, 10_000)([stated])
        labels, confidence_mask = batch.labels[0], batch.confidence_mask[0]
        name = ("reference" if self.module.reference == "adapter" else None) if reference else "default"
        with torch.no_grad(), using_adapter(model, name):
            log_p = torch.log_softmax(model(**batch.inputs).logits[0].double(), -1)
        positions = (labels != IGNORE).nonzero()[:, 0]
        assert int((~confidence_mask[positions]).sum()) == candidate.answer_length
        return log_p[positions - 1, labels[positions]].tolist()

    def plain(self, row: int, candidate: Candidate, reference: bool = False) -> tuple[float, float, int]:
        """log p of a candidate and of its answer alone, and its length."""
        values = self.by_token(row, candidate, reference)
        return sum(values), sum(values[: candidate.answer_length]), len(values)

    def expected(self, row: int, reference: bool = True) -> float:
        """The mean of the levels under a softmax over the plain log-likelihoods of all of them."""
        levels = [c for c in self.batch.candidates[row] if not c.wrong]
        log_p = np.array([self.plain(row, c, reference)[0] for c in levels])
        p = np.exp(log_p - log_p.max())
        return float((p / p.sum()) @ [c.confidence for c in levels])


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


def adapter_weights(module: DPOModule, name: str) -> dict[str, Tensor]:
    """Weights of one adapter, named as in its file."""
    return {
        key.removeprefix("model.").replace(f".{name}.", "."): p.detach().clone()
        for key, p in module.named_parameters()
        if f".{name}." in key
    }
