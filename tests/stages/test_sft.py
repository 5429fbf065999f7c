"""Stage 1: the weights in its loss, what training changes and writes, and that it learns."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from vlm_calibration.callbacks.adapter import AdapterWriter
from vlm_calibration.callbacks.checkpoint import RunCheckpoint
from vlm_calibration.callbacks.nan_guard import NanGuard
from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.data.collate import IGNORE, SFTBatch
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.forward import LabelledLogits
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.records import DataError
from vlm_calibration.stages import sft
from vlm_calibration.stages.optimization import OptimizerSettings
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import trained_parameters
from vlm_calibration.text.confidence import render_answer

from ..disasters import Spoil, SpoilGradient
from ..level_tables import OnlyAt

Data = Callable[..., PerturbedQueryDataModule]
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


class Observed:
    """Runs training steps outside a Trainer and records the label logits and the logged values."""

    def __init__(self, module: SFTModule, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = module
        self.logged: dict[str, float] = {}
        self.labelled: LabelledLogits | None = None
        module.configure_model()
        monkeypatch.setattr(module, "log", lambda name, value, **_: self.logged.update({name: float(value)}))
        original = sft.labelled_logits

        def watched(*arguments: Any) -> LabelledLogits:
            self.labelled = original(*arguments)
            self.labelled.logits.retain_grad()
            return self.labelled

        monkeypatch.setattr(sft, "labelled_logits", watched)

    def loss(self, batch: SFTBatch) -> Tensor:
        return self.module.training_step(batch, 0)

    @property
    def log_likelihood(self) -> list[float]:
        assert self.labelled is not None
        logits, targets, _ = self.labelled
        return torch.log_softmax(logits.double(), -1)[range(len(targets)), targets].tolist()


def _by_hand(
    batch: SFTBatch, log_likelihood: Sequence[float], answer: Sequence[float], confidence: float
) -> float:
    """1/B sum_b 1/|b| sum_t -w_t log p_t, with w the row's `answer` weight or the `confidence` weight."""
    tokens = iter(log_likelihood)
    rows = []
    for labels, mask, weight in zip(batch.labels, batch.confidence_mask, answer, strict=True):
        terms = [
            -(confidence if is_confidence else weight) * next(tokens)
            for label, is_confidence in zip(labels.tolist(), mask.tolist(), strict=True)
            if label != IGNORE
        ]
        rows.append(sum(terms) / len(terms))
    assert next(tokens, None) is None
    return sum(rows) / len(rows)


@pytest.mark.parametrize(
    ("settings", "answer", "confidence"),
    [
        ({}, [1.0, 1.0, 1.0], 1.0),
        ({"confidence_weight": 0.0}, [1.0, 1.0, 1.0], 0.0),
        ({"answer_weight": "confidence", "confidence_weight": 3.0}, [0.9, 0.4, 0.0], 3.0),
    ],
)
def test_the_loss_weights_tokens_as_configured(
    model_folder: str,
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    answer: list[float],
    confidence: float,
) -> None:
    batch = _batch(data())
    observed = Observed(_module(model_folder, **settings), monkeypatch)
    loss = observed.loss(batch)
    assert float(loss) == pytest.approx(
        _by_hand(batch, observed.log_likelihood, answer, confidence), rel=1e-5
    )

    loss.backward()
    assert observed.labelled is not None
    gradient = observed.labelled.logits.grad.abs().amax(dim=-1)  # type: ignore[union-attr]
    mask = batch.confidence_mask[:, 1:][batch.labels[:, 1:] != IGNORE]
    weights = torch.where(mask, torch.tensor(confidence), torch.tensor(answer)[observed.labelled.rows])
    assert torch.equal(gradient > 0, weights > 0)

    likelihood = torch.tensor(observed.log_likelihood)
    assert observed.logged["train/loss"] == pytest.approx(float(loss))
    assert observed.logged["train/nll_answer"] == pytest.approx(-float(likelihood[~mask].mean()), rel=1e-4)
    assert observed.logged["train/nll_confidence"] == pytest.approx(-float(likelihood[mask].mean()), rel=1e-4)


def test_a_batch_whose_samples_are_all_too_long_teaches_nothing(
    model_folder: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = _batch(data())
    observed = Observed(_module(model_folder), monkeypatch)
    empty_labels = torch.zeros((0, 0), dtype=torch.int64)
    empty = SFTBatch(
        {}, empty_labels, empty_labels.bool(), torch.zeros(0), torch.zeros(0).bool(), (), ("a", "b")
    )
    loss = observed.loss(empty)
    assert float(loss) == 0
    loss.backward()
    parameters = trained_parameters(observed.module)
    assert all(p.grad is not None and not p.grad.any() for p in parameters), "processes stay in step"
    observed.loss(batch._replace(skipped=("c",)))
    assert observed.module.skipped == observed.logged["train/skipped"] == 3


def test_gradient_checkpointing_changes_no_gradient(
    model_folder: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = _batch(data())
    gradients = []
    for checkpointing in (False, True):
        with monkeypatch.context() as patch:
            observed = Observed(_module(model_folder, gradient_checkpointing=checkpointing), patch)
            assert observed.module.model.training
            assert observed.module.model.get_base_model().is_gradient_checkpointing == checkpointing
            runs: list[int] = []
            layer = observed.module.model.get_base_model().model.language_model.layers[0].mlp
            layer.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
            observed.loss(batch).backward()
            assert len(runs) == (2 if checkpointing else 1), "recomputed in the backward pass"
            gradients.append([p.grad for p in trained_parameters(observed.module)])
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, atol=1e-6 * max(1.0, float(plain.abs().max())))


def test_checkpointing_leaves_a_frozen_tower_out_of_the_graph(
    model_folder: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _module(model_folder, lora=LoraSettings(dropout=0.0), gradient_checkpointing=True)
    observed = Observed(module, monkeypatch)
    seen: list[bool] = []
    module.model.get_base_model().model.vision_tower.register_forward_hook(
        lambda module, inputs, output: seen.append(output.last_hidden_state.requires_grad)
    )
    observed.loss(_batch(data())).backward()
    assert seen == [False], "its activations are neither stored nor recomputed"
    assert any(p.grad is not None and bool(p.grad.any()) for p in trained_parameters(module))


class Losses(L.Callback):
    """Records the loss of each step, the confidence of each query by epoch, and the number of answers of each validation."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.confidences: list[dict[str, float]] = []
        self.validated: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        self.validated.append(module.results[""]["n"])

    def on_train_epoch_start(self, *_: Any) -> None:
        self.confidences.append({})

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: SFTBatch, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.confidences[-1].update(
            zip((q.id for q in batch.queries), batch.confidence.tolist(), strict=True)
        )


@pytest.mark.slow
def test_a_run_learns_and_writes_what_it_should(
    model_folder: str,
    load_model: Callable[..., Any],
    data: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
) -> None:
    noise = NoisePolicy(clean_fraction=1.0)
    module = _module(model_folder)
    seen = Losses()
    run = trainer(
        *(RunCheckpoint(), AdapterWriter(), PredictionWriter(), seen),
        enable_checkpointing=True,
        max_epochs=10,
    )
    run.fit(module, datamodule=data(noise=noise))
    assert len(seen.losses) == 30
    first, last = seen.losses[:3], seen.losses[-3:]
    assert sum(last) < 0.4 * sum(first)

    base = dict(load_model().named_parameters())
    for name, parameter in module.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace("base_layer.", "")]), name

    folder = tmp_path / "run"
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert set(checkpoint["state_dict"]) == set(trained)
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert (folder / "checkpoints" / "last.ckpt").stat().st_size < Path(
        model_folder, "model.safetensors"
    ).stat().st_size

    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in trained.values())
    again = PeftModel.from_pretrained(load_model(), folder / "adapter")
    loaded = {name: p for name, p in again.named_parameters() if "lora_" in name}
    assert all(torch.equal(loaded[name.removeprefix("model.")], p) for name, p in trained.items())
    assert (folder / "adapter" / "tokenizer.json").is_file(), "the processor is saved beside it"

    lines = [
        json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["id"] for line in lines] == [
        f"calibration-000000-{kind}" for kind in ("yes", "no", "corner")
    ]
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["n"] == 3
    assert metrics["accuracy"] == pytest.approx(sum(line["correct"] for line in lines) / 3)
    assert {p.name for p in folder.iterdir()} == {
        "adapter",
        "checkpoints",
        "predictions.jsonl",
        "metrics.json",
    }


def test_a_run_repeats_bit_by_bit_on_new_noise_in_every_epoch_and_counts_each_validation_from_zero(
    model_folder: str, data: Data, trainer: Callable[..., L.Trainer]
) -> None:
    runs = []
    for workers in (0, 1):
        seen = Losses()
        run = trainer(seen, max_epochs=2, num_sanity_val_steps=1)
        run.fit(_module(model_folder), datamodule=data(workers=workers))
        runs.append(seen)
    first, again = runs
    assert first.losses == again.losses
    assert all(len(of_epoch) == 9 for of_epoch in first.confidences)
    assert first.confidences[0] != first.confidences[1]
    assert first.validated == [3, 3, 3]


@pytest.mark.parametrize(
    ("disaster", "accumulated", "named"), [(Spoil, 1, 2), (Spoil, 2, 4), (SpoilGradient, 1, 2)]
)
def test_a_loss_or_gradient_that_is_no_number_names_the_records_and_leaves_the_last_checkpoint(
    model_folder: str,
    data: Data,
    trainer: Callable[..., L.Trainer],
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


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_negative_or_not_finite_is_refused(model_folder: str, weight: float) -> None:
    with pytest.raises(DataError, match=f"model.confidence_weight .* found {weight}"):
        _module(model_folder, confidence_weight=weight)


def test_settings_that_do_not_fit_are_refused(
    model_folder: str, data: Data, trainer: Callable[..., L.Trainer]
) -> None:
    with pytest.raises(DataError, match=r"data\.candidates is set, but SFT learns one response"):
        trainer(max_steps=1).fit(_module(model_folder), datamodule=data(candidates=CandidateSettings()))
    run = trainer(max_epochs=-1, limit_val_batches=0)
    with pytest.raises(DataError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        run.fit(_module(model_folder), datamodule=data())


def test_a_wrong_answer_is_not_taught_but_its_confidence_is(
    model_folder: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = _batch(data())._replace(is_correct=torch.tensor([True, False, True]))
    observed = Observed(_module(model_folder), monkeypatch)
    loss = observed.loss(batch)
    by_hand = _by_hand(batch, observed.log_likelihood, [1.0, 0.0, 1.0], 1.0)
    assert float(loss) == pytest.approx(by_hand, rel=1e-5)
    assert observed.labelled is not None
    gold_answer = ~batch.confidence_mask[batch.labels != IGNORE] & (observed.labelled.rows != 1)
    likelihood = torch.tensor(observed.log_likelihood)
    assert observed.logged["train/nll_answer"] == pytest.approx(
        -float(likelihood[gold_answer].mean()), rel=1e-4
    )
    observed.loss(batch._replace(is_correct=torch.tensor([False] * 3))).backward()
    gradient = observed.labelled.logits.grad
    assert gradient is not None
    assert torch.equal(gradient.abs().amax(dim=-1) > 0, batch.confidence_mask[batch.labels != IGNORE])
    assert observed.logged["train/nll_answer"] == pytest.approx(
        -float(likelihood[gold_answer].mean()), rel=1e-4
    ), "nothing new to log"


def test_the_batch_marks_wrong_answers(model_folder: str, data: Data) -> None:
    queries = data(noise=NoisePolicy(wrong_answer_rate=1.0, levels=OnlyAt(drawn=(0.5,))))
    queries.setup("fit")
    loader = queries.train_dataloader()
    samples = {s.query.id: s for s in (loader.dataset[0, i] for i in range(9))}
    is_correct = []
    for batch in loader:
        is_correct += batch.is_correct.tolist()
        for row, query in enumerate(batch.queries):
            sample = samples[query.id]
            assert batch.is_correct[row] == (sample.wrong_answer is None)
            answer = batch.labels[row][(batch.labels[row] != IGNORE) & ~batch.confidence_mask[row]]
            text = queries.processor.tokenizer.decode(answer).strip()
            assert text == render_answer(sample.answer)
    assert set(is_correct) == {True, False}
