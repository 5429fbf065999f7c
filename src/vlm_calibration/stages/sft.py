"""Stage 1: supervised fine-tuning on noised images with the confidence that the noise earns.

Maximises log p(response, confidence | noised image, question) (CSP, arXiv 2504.14848) over a LoRA adapter.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from torch import Tensor

from vlm_calibration.data.collate import SFTBatch
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.pairs import ValidationBatch
from vlm_calibration.losses.sequence import (
    AnswerWeight,
    response_nll,
    token_log_likelihood,
    token_weights,
)
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.forward import labelled_logits
from vlm_calibration.models.loading import BaseModel, load_for_training
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.stages.answering import answer_batch, tokenizer_of
from vlm_calibration.stages.device import device_of, ready_to_train
from vlm_calibration.stages.optimization import OptimizerSettings
from vlm_calibration.stages.provenance import check_levels
from vlm_calibration.stages.scoring import Results, Scorer
from vlm_calibration.stages.training import (
    check_trained,
    keep_trained,
    log_results,
    no_loss,
    optimizers_of,
    seed_batch,
    warn_of_skipped,
)


class SFTModule(L.LightningModule):
    """Trains an adapter to answer, and to say how sure it should be.

    Args:
        base: the model to adapt.
        lora: the adapter.
        optimizer: AdamW and its schedule.
        confidence_weight: weight of the confidence's tokens in the loss, at least 0; the answer's have 1.
        answer_weight: "constant", or "confidence": the answer's tokens are weighed by the confidence to state, so that
            the model is not taught to assert what it cannot see.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
        max_new_tokens: length limit of the answers generated in validation.
    """

    model: Any
    results: Results

    def __init__(
        self,
        base: BaseModel,
        lora: LoraSettings = LoraSettings(),  # noqa: B008  (frozen)
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008  (frozen)
        confidence_weight: float = 1.0,
        answer_weight: AnswerWeight = "constant",
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 64,
    ) -> None:
        super().__init__()
        if not 0 <= confidence_weight < math.inf:
            raise DataError(
                f"model.confidence_weight must be a finite number of at least 0, found {confidence_weight}"
            )
        self.base = base
        self.lora = lora
        self.optimizer_settings = optimizer
        self.confidence_weight = confidence_weight
        self.answer_weight = answer_weight
        self.gradient_checkpointing = gradient_checkpointing
        self.max_new_tokens = max_new_tokens
        self.scorer = Scorer()
        self.skipped = 0
        # Checkpoints hold what is trained; the frozen base comes from where it came from.
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        self.check_data(self.trainer.datamodule)  # type: ignore[attr-defined]

    def check_data(self, data: PerturbedQueryDataModule) -> None:
        """Refuse data whose levels were measured for something else, before a model is loaded."""
        check_levels(data.noise.levels, self.base, data)

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        model = load_for_training(self.base, device_of(self))
        self.model = ready_to_train(self, attach_lora(model, self.lora), self.gradient_checkpointing)

    def on_fit_start(self) -> None:
        if getattr(self.trainer.datamodule, "pairs", None) is not None:  # type: ignore[attr-defined]
            raise DataError(
                "data.pairs is set, which is for preference optimisation: SFT learns one response"
            )

    def on_train_batch_start(self, batch: SFTBatch, batch_idx: int) -> None:
        seed_batch(self, batch_idx)

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        self.skipped += len(batch.skipped)
        if not batch.inputs:
            return no_loss(self)
        found = labelled_logits(self.model, batch.inputs, batch.labels)
        log_likelihood = token_log_likelihood(found.logits, found.targets)
        weights = token_weights(
            batch.label_confidence_mask,
            batch.confidence[found.rows],
            batch.is_correct[found.rows],
            self.answer_weight,
            self.confidence_weight,
        )
        loss = response_nll(log_likelihood, found.rows, weights, len(batch.queries))
        stated = batch.label_confidence_mask
        size = len(batch.queries)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        right = ~stated & batch.is_correct[found.rows]
        if bool(right.any()):
            self.log("train/nll_answer", -log_likelihood[right].mean().detach(), batch_size=size)
        self.log(
            "train/nll_confidence", -log_likelihood[stated].mean().detach(), prog_bar=True, batch_size=size
        )
        self.log("train/skipped", float(self.skipped), batch_size=size)
        return loss

    def on_validation_start(self) -> None:
        self.scorer.reset()

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> dict[str, list[Prediction]]:
        predictions = answer_batch(self.model, batch.prompts, tokenizer_of(self), self.max_new_tokens)
        self.scorer.update(predictions)
        return {"": predictions}

    def on_validation_epoch_end(self) -> None:
        self.results = {"": self.scorer.compute()}
        log_results(self, self.results)

    def on_train_end(self) -> None:
        warn_of_skipped(self, self.skipped)

    def configure_optimizers(self) -> Any:
        return optimizers_of(self, self.optimizer_settings)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_trained(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_trained(self, checkpoint)
