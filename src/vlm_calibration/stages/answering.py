"""What every module that questions a model needs: its device, its shards, its tokenizer, and its graded answers to a batch."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.estimators.predictions import graded_prediction
from vlm_calibration.models.base import BaseModel
from vlm_calibration.models.generation import generate_texts
from vlm_calibration.models.sharding import shard
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.text.confidence import end_of_confidence


def device_of(module: L.LightningModule) -> torch.device:
    """The device that the trainer runs a module on; the module's own without a trainer."""
    # A quantised model is loaded onto its device before Lightning moves anything there.
    attached = module._trainer is not None
    return module.trainer.strategy.root_device if attached else module.device


def check_shardable(module: L.LightningModule, base: BaseModel) -> None:
    """Check that the trainer's strategy can shard a model, before its weights are loaded.

    Raises:
        DataError: it cannot: the scales of int8 weights are lost with the class of their parameters.
    """
    if module.device_mesh is not None and base.quantization == "int8":
        raise DataError(
            "model.init_args.base.quantization: int8 weights cannot be sharded, which the trainer's strategy "
            f"{type(module.trainer.strategy).__name__} does: use `nf4` or `none`, or another strategy"
        )


def shard_as_asked(module: L.LightningModule, model: Any) -> Any:
    """The model, sharded over the processes in place if the trainer's strategy asks for it."""
    if module.device_mesh is not None:
        shard(model, module.device_mesh["data_parallel"])
    return model


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
