"""Stage 1: supervised fine-tuning (CSP, arXiv 2504.14848) maximises log p(response, confidence | noised image, question)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm_calibration.data.collate import SFTBatch
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.losses.sequence import (
    IGNORE,
    AnswerWeight,
    response_nll,
    token_log_likelihood,
    token_weights,
)
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.forward import labelled_logits
from vlm_calibration.models.loading import BaseModel, load_for_training
from vlm_calibration.records import DataError
from vlm_calibration.stages.provenance import check_levels
from vlm_calibration.stages.training import OptimizerSettings, TrainingStage, device_of


class SFTModule(TrainingStage):
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
        super().__init__(base, optimizer, gradient_checkpointing, max_new_tokens)
        self.lora = lora
        self.confidence_weight = confidence_weight
        self.answer_weight = answer_weight
        self.check_weights("confidence_weight")

    def title(self, data: PerturbedQueryDataModule) -> str:
        return "stage 1: supervised fine-tuning (SFT)"

    def check_data(self, data: PerturbedQueryDataModule) -> None:
        check_levels(data.noise.levels, self.base, data)

    def load_adapted(self) -> Any:
        return attach_lora(load_for_training(self.base, device_of(self)), self.lora)

    def on_fit_start(self) -> None:
        if self.data.candidates is not None:
            raise DataError(
                "data.candidates is set, but SFT learns one response per query: leave it out, or run preference optimisation"
            )

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        self.skipped += len(batch.skipped)
        if not self.has_samples(batch):
            return self.zero_loss()
        # logits [N, V] at the N label tokens
        labelled = labelled_logits(self.model, batch.inputs, batch.labels)
        log_likelihood = token_log_likelihood(labelled.logits, labelled.targets)  # [N]
        confidence_mask = batch.confidence_mask[batch.labels != IGNORE]  # [N]
        is_correct = batch.is_correct[labelled.rows]  # [N]
        confidence = batch.confidence[labelled.rows]  # [N]
        weights = token_weights(
            confidence_mask, confidence, is_correct, self.answer_weight, self.confidence_weight
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
