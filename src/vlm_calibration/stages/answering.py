"""From a batch of prompts to graded predictions."""

from __future__ import annotations

from typing import Any

import lightning as L

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.estimators.predictions import graded_prediction
from vlm_calibration.models.generation import generate_texts
from vlm_calibration.records import Prediction
from vlm_calibration.text.confidence import end_of_confidence


def answer_batch(model: Any, batch: PromptBatch, tokenizer: Any, max_new_tokens: int) -> list[Prediction]:
    """Generate, parse and grade the answers to one batch; each is an `EstimatedPrediction`, and ends with its confidence.

    A batch of no queries has no answers.
    """
    if not batch.queries:
        return []
    texts = generate_texts(model, batch.inputs, tokenizer, max_new_tokens, end_of_confidence)
    return [
        graded_prediction(query, text, step)
        for query, text, step in zip(batch.queries, texts, batch.steps, strict=True)
    ]


def tokenizer_of(module: L.LightningModule) -> Any:
    """The tokenizer of the data that the module is being run on."""
    return module.trainer.datamodule.processor.tokenizer  # type: ignore[attr-defined]
