"""Stage 1: supervised fine-tuning on noised images with the confidence of their noise level.

Maximises log p(response, confidence | noised image, question) (CSP, arXiv 2504.14848) over a LoRA adapter.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from torch import Tensor

from vlm_calibration.data.candidates import ValidationBatch
from vlm_calibration.data.collate import SFTBatch
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.estimators.generating import answer_batch
from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.losses.sequence import (
    AnswerWeight,
    response_nll,
    token_log_likelihood,
    token_weights,
)
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.forward import labelled_logits
from vlm_calibration.models.loading import BaseModel, load_for_training
from vlm_calibration.records import DataError
from vlm_calibration.stages import training
from vlm_calibration.stages.optimization import OptimizerSettings, adamw_with_schedule
from vlm_calibration.stages.provenance import check_levels
from vlm_calibration.stages.scoring import Results, Scorer


class SFTModule(L.LightningModule):
    """Trains an adapter to answer and to state the confidence of the noise level.

    Args:
        base: the model to adapt.
        lora: settings of the adapter.
        optimizer: AdamW and its schedule.
        confidence_weight: weight of the confidence's tokens in the loss, at least 0.
        answer_weight: weight of a correct answer's tokens in the loss: "constant" is 1, "confidence" the confidence to
            state, so that the model does not learn to assert what it cannot see. Tokens of a wrong answer have weight 0.
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
        # Checkpoints hold the trained weights alone; the frozen base is loaded again.
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        training.check_strategy(self, stage, self.base.quantization)
        self.check_data(self.trainer.datamodule)  # type: ignore[attr-defined]

    def title(self, data: PerturbedQueryDataModule) -> str:
        """What is taught."""
        return "stage 1: supervised fine-tuning (SFT)"

    def check_data(self, data: PerturbedQueryDataModule) -> None:
        """Reject data whose levels were measured differently, before the model is loaded."""
        check_levels(data.noise.levels, self.base, data)

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        model = load_for_training(self.base, training.device_of(self))
        self.model = training.prepare_for_training(
            self, attach_lora(model, self.lora), self.gradient_checkpointing
        )

    def on_fit_start(self) -> None:
        if getattr(self.trainer.datamodule, "candidates", None) is not None:  # type: ignore[attr-defined]
            raise DataError(
                "data.candidates is set, but SFT learns one response per query: leave it out, or run preference optimisation"
            )

    def on_train_batch_start(self, batch: SFTBatch, batch_idx: int) -> None:
        training.seed_batch(self, batch_idx)

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        self.skipped += len(batch.skipped)
        if not training.has_samples(self, batch):
            return training.zero_loss(self)
        labelled = labelled_logits(
            self.model, batch.inputs, batch.labels
        )  # logits [N, V] at the N label tokens
        log_likelihood = token_log_likelihood(labelled.logits, labelled.targets)  # [N]
        confidence_mask = batch.label_confidence_mask  # [N]
        is_correct = batch.is_correct[labelled.rows]  # [N]
        weights = token_weights(
            confidence_mask,
            batch.confidence[labelled.rows],
            is_correct,
            self.answer_weight,
            self.confidence_weight,
        )
        size = len(batch.queries)
        loss = response_nll(log_likelihood, labelled.rows, weights, size)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        gold_answer = ~confidence_mask & is_correct
        if bool(gold_answer.any()):
            self.log("train/nll_answer", -log_likelihood[gold_answer].mean().detach(), batch_size=size)
        nll_confidence = -log_likelihood[confidence_mask].mean().detach()
        self.log("train/nll_confidence", nll_confidence, prog_bar=True, batch_size=size)
        self.log("train/skipped", float(self.skipped), batch_size=size)
        return loss

    def on_validation_start(self) -> None:
        self.scorer.reset()

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> dict[str, list[EstimatedPrediction]]:
        predictions = answer_batch(
            self.model, batch.prompts, training.tokenizer_of(self), self.max_new_tokens
        )
        self.scorer.update(predictions)
        return {"": predictions}

    def on_validation_epoch_end(self) -> None:
        self.results = {"": self.scorer.compute()}
        training.log_results(self, self.results)

    def on_train_end(self) -> None:
        training.warn_of_total(self, self.skipped, training.TOO_LONG)

    def configure_optimizers(self) -> Any:
        return adamw_with_schedule(
            training.trained_parameters(self),
            self.optimizer_settings,
            self.trainer.estimated_stepping_batches,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        training.keep_trained_weights(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        training.check_trained_weights(self, checkpoint)
