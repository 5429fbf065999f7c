"""Stage 1: the weights in its loss, what stops a run, and what it refuses. `models/test_whole_path.py` tests that it learns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_calibration.callbacks.adapter import AdapterWriter
from vlm_calibration.callbacks.checkpoint import RunCheckpoint
from vlm_calibration.callbacks.nan_guard import NanGuard
from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.data.collate import IGNORE, SFTBatch
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.losses.sequence import response_nll
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.forward import LabelledLogits
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.records import DataError
from vlm_calibration.stages import sft
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import OptimizerSettings, trained_parameters
from vlm_calibration.text.confidence import render_answer

from ..disasters import Spoil, SpoilGradient
from ..level_tables import OnlyAt
from .conftest import Data, MakeTrainer

ALL_PARTS = ["language", "tower", "projector"]


def _module(folder: str, **settings: Any) -> SFTModule:
    lora = LoraSettings(r=8, alpha=16, dropout=0.0, parts=ALL_PARTS)  # type: ignore[arg-type]
    plain = {"lora": lora, "max_new_tokens": 6, "optimizer": OptimizerSettings(lr=3e-3)}
    torch.manual_seed(0)
    return SFTModule(BaseModel(folder, dtype="float32"), **{**plain, **settings})


def _batch(data: PerturbedQueryDataModule) -> SFTBatch:
    """The first batch, with a different confidence in every row."""
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    return batch._replace(confidence=torch.tensor([0.9, 0.4, 0.0]))


def _configured(module: SFTModule, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Load the model of a module outside a Trainer; returns what the module logs."""
    logged: dict[str, float] = {}
    module.configure_model()
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    return logged


@pytest.mark.parametrize(
    ("settings", "correct", "answer", "confidence"),
    [
        ({}, [True, True, True], [1.0, 1.0, 1.0], 1.0),
        ({"confidence_weight": 0.0}, [True, False, True], [1.0, 0.0, 1.0], 0.0),
        (
            {"answer_weight": "confidence", "confidence_weight": 3.0},
            [True, True, False],
            [0.9, 0.4, 0.0],
            3.0,
        ),
        ({}, [False, False, False], [0.0, 0.0, 0.0], 1.0),
    ],
)
def test_the_loss_weights_tokens_as_configured_and_teaches_no_wrong_answer(
    model_folder: str,
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    correct: list[bool],
    answer: list[float],
    confidence: float,
) -> None:
    batch = _batch(data())._replace(is_correct=torch.tensor(correct))
    module = _module(model_folder, **settings)
    logged = _configured(module, monkeypatch)
    found: list[LabelledLogits] = []
    original = sft.labelled_logits

    def watched(*arguments: Any) -> LabelledLogits:
        found.append(original(*arguments))
        return found[0]

    monkeypatch.setattr(sft, "labelled_logits", watched)
    loss = module.training_step(batch, 0)
    [(logits, targets, rows)] = found
    logits.retain_grad()
    loss.backward()
    likelihood = torch.log_softmax(logits.detach().double(), -1)[range(len(targets)), targets]
    mask = batch.confidence_mask[:, 1:][batch.labels[:, 1:] != IGNORE]
    weights = torch.where(mask, torch.tensor(confidence), torch.tensor(answer)[rows])
    assert float(loss) == pytest.approx(float(response_nll(likelihood, rows, weights, 3)), rel=1e-5)
    assert torch.equal(logits.grad.abs().amax(dim=-1) > 0, weights > 0)  # type: ignore[union-attr]

    expected = {"loss": float(loss), "nll_confidence": -float(likelihood[mask].mean()), "skipped": 0}
    if any(correct):
        expected["nll_answer"] = -float(likelihood[~mask & batch.is_correct[rows]].mean())
    assert logged == pytest.approx({f"train/{k}": v for k, v in expected.items()}, rel=1e-4)


def test_a_batch_whose_samples_are_all_too_long_teaches_nothing(
    model_folder: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, module = _batch(data()), _module(model_folder)
    logged = _configured(module, monkeypatch)
    labels = torch.zeros((0, 0), dtype=torch.int64)
    empty = SFTBatch({}, labels, labels.bool(), torch.zeros(0), torch.zeros(0).bool(), (), ("a", "b"))
    loss = module.training_step(empty, 0)
    assert float(loss) == 0
    loss.backward()
    parameters = trained_parameters(module)
    assert all(p.grad is not None and not p.grad.any() for p in parameters), "processes stay in step"
    module.training_step(batch._replace(skipped=("c",)), 0)
    assert module.skipped == logged["train/skipped"] == 3


def test_gradient_checkpointing_changes_no_gradient_and_leaves_a_frozen_tower_out_of_the_graph(
    model_folder: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, lora = _batch(data()), LoraSettings(r=8, dropout=0.0)
    gradients = []
    for checkpointing in (False, True):
        module = _module(model_folder, lora=lora, gradient_checkpointing=checkpointing)
        _configured(module, monkeypatch)
        assert module.model.training
        base = module.model.get_base_model()
        assert base.is_gradient_checkpointing == checkpointing
        runs: list[int] = []
        layer = base.model.language_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        seen: list[bool] = []
        base.model.vision_tower.register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.append(output.last_hidden_state.requires_grad)
        )
        module.training_step(batch, 0).backward()
        assert len(runs) == (2 if checkpointing else 1), "recomputed in the backward pass"
        assert seen == [False], "the tower's activations are neither stored nor recomputed"
        gradients.append([p.grad for p in trained_parameters(module)])
    assert any(p.any() for p in gradients[0])
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, atol=1e-6 * max(1.0, float(plain.abs().max())))


@pytest.mark.parametrize(("disaster", "accumulated", "named"), [(Spoil, 2, 4), (SpoilGradient, 1, 2)])
def test_a_loss_or_gradient_that_is_no_number_names_the_records_and_leaves_the_last_checkpoint(
    model_folder: str,
    data: Data,
    trainer: MakeTrainer,
    tmp_path: Path,
    disaster: type[Spoil | SpoilGradient],
    accumulated: int,
    named: int,
) -> None:
    """With two batches per step, the spoilt weight reaches both."""
    run = trainer(
        *(disaster(batch=2), RunCheckpoint(every_n_train_steps=1), NanGuard(), AdapterWriter()),
        enable_checkpointing=True,
        max_epochs=1,
        accumulate_grad_batches=accumulated,
    )
    with pytest.raises(DataError) as caught:
        run.fit(_module(model_folder), datamodule=data(batch_size=2))
    step, what = 2 // accumulated, "loss" if disaster is Spoil else "gradient"
    assert f"{what} is not finite at step {step}" in str(caught.value)
    assert len(re.findall(r"\btrain-[\w-]+", str(caught.value))) == named
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == step
    assert all(v.isfinite().all() for v in checkpoint["state_dict"].values())
    assert not (tmp_path / "run/adapter").exists()


def test_settings_that_do_not_fit_are_refused(model_folder: str, data: Data, trainer: MakeTrainer) -> None:
    with pytest.raises(DataError, match=r"data\.candidates is set, but SFT learns one response"):
        trainer(max_steps=1).fit(_module(model_folder), datamodule=data(candidates=CandidateSettings()))
    with pytest.raises(DataError, match=r"model\.confidence_weight must be a finite number of at least 0"):
        _module(model_folder, confidence_weight=-1.0)
    run = trainer(max_epochs=-1, limit_val_batches=0)
    with pytest.raises(DataError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        run.fit(_module(model_folder), datamodule=data())


def test_the_batch_marks_wrong_answers(data: Data) -> None:
    noise = NoisePolicy(wrong_answer_rate=1.0, levels=OnlyAt(drawn=(0.5,)))
    queries = data(noise=noise, batch_size=9)
    queries.setup("fit")
    loader = queries.train_dataloader()
    [batch] = loader
    samples = {s.query.id: s for s in (loader.dataset[0, i] for i in range(9))}
    assert set(batch.is_correct.tolist()) == {True, False}
    for row, query in enumerate(batch.queries):
        sample = samples[query.id]
        assert batch.is_correct[row] == (sample.wrong_answer is None)
        answer = batch.labels[row][(batch.labels[row] != IGNORE) & ~batch.confidence_mask[row]]
        assert queries.processor.tokenizer.decode(answer).strip() == render_answer(sample.answer)
