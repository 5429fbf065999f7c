"""What every module that questions a model needs: its device, its tokenizer, and its graded answers to a batch."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.estimators.predictions import graded_prediction
from vlm_calibration.models.generation import generate_texts
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.text.confidence import end_of_confidence


def device_of(module: L.LightningModule) -> torch.device:
    """The device that the trainer runs a module on; the module's own without a trainer."""
    # A quantised model is loaded onto its device before Lightning moves anything there.
    attached = module._trainer is not None
    return module.trainer.strategy.root_device if attached else module.device


def refuse_sharding(module: L.LightningModule) -> None:
    """Refuse to answer with sharded weights, before they are loaded.

    Raises:
        DataError: the trainer's strategy shards the weights.
    """
    if module.device_mesh is not None:
        raise DataError(
            "trainer.strategy: FSDP2 (ModelParallelStrategy) trains, but does not generate answers: use one device, trainer/ddp, or a "
            "model behind an address (model.endpoints of `test`)"
        )


def tokenizer_of(module: L.LightningModule) -> Any:
    """The tokenizer of the data that the trainer runs a module on."""
    return module.trainer.datamodule.processor.tokenizer  # type: ignore[attr-defined]


def answer_batch(model: Any, batch: PromptBatch, tokenizer: Any, max_new_tokens: int) -> list[Prediction]:
    """Generate, parse and grade the answers to a batch, as `EstimatedPrediction`s. Generation stops after the confidence.

    Args:
        model: a transformers or peft model, or a `GenerationRecorder` of one.
        batch: B prompts; no prompts give no answers.
    """
    if not batch.queries:
        return []
    texts = generate_texts(model, batch.inputs, tokenizer, max_new_tokens, end_of_confidence)
    rows = zip(batch.queries, texts, batch.perturbations, batch.noise_steps, strict=True)
    return [
        graded_prediction(query, text, perturbation, step, batch.grading)
        for query, text, perturbation, step in rows
    ]
