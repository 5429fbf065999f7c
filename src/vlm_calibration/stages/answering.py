"""From a batch of prompts to graded predictions."""

from __future__ import annotations

from typing import Any

import lightning as L

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.models.generation import generate_texts
from vlm_calibration.records import Prediction, Query
from vlm_calibration.text.confidence import parse_confidence
from vlm_calibration.text.grading import grade


def answer_batch(model: Any, batch: PromptBatch, tokenizer: Any, max_new_tokens: int) -> list[Prediction]:
    """Generate, parse and grade the answers to one batch; each is an `EstimatedPrediction`."""
    texts = generate_texts(model, batch.inputs, tokenizer, max_new_tokens)
    return [
        graded_prediction(query, text, step)
        for query, text, step in zip(batch.queries, texts, batch.steps, strict=True)
    ]


def tokenizer_of(module: L.LightningModule) -> Any:
    """The tokenizer of the data that the module is being run on."""
    return module.trainer.datamodule.processor.tokenizer  # type: ignore[attr-defined]


def graded_prediction(query: Query, text: str, noise_step: int | None) -> EstimatedPrediction:
    """The prediction that this output amounts to."""
    outcome = grade(text, query.answer, query.answer_type, query.synonyms)
    return EstimatedPrediction(
        id=query.id,
        question=query.question,
        answer=query.answer,
        text=text,
        predicted=outcome.predicted,
        confidence=parse_confidence(text),
        correct=outcome.correct,
        category=query.category,
        noise_step=noise_step,
        answer_type=query.answer_type,
        image=query.image,
    )
