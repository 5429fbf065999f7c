"""From a batch of prompts to graded predictions."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.estimators.answer_scoring import right_padded
from vlm_calibration.estimators.generating import GenerationRecorder
from vlm_calibration.estimators.predictions import graded_prediction
from vlm_calibration.models.generation import generate_texts
from vlm_calibration.models.shared_prefix import score_responses
from vlm_calibration.records import Prediction
from vlm_calibration.text.confidence import end_of_confidence


def answer_batch(model: Any, batch: PromptBatch, tokenizer: Any, max_new_tokens: int) -> list[Prediction]:
    """Generate, parse and grade the answers to one batch; each is an `EstimatedPrediction`, and ends with its confidence.

    A batch of no queries has no answers.

    Args:
        model: a transformers or peft model, or `GenerationRecorder` with one.
    """
    if not batch.queries:
        return []
    texts = generate_texts(model, batch.inputs, tokenizer, max_new_tokens, end_of_confidence)
    ranking = ranked_right(model.model if isinstance(model, GenerationRecorder) else model, batch)
    rows = zip(batch.queries, texts, batch.steps, ranking, strict=True)
    return [graded_prediction(query, text, step, batch.grading, right) for query, text, step, right in rows]


@torch.no_grad()
def ranked_right(model: Any, batch: PromptBatch) -> list[bool | None]:
    """Whether the model holds the gold answer likelier, per token, than every wrong one; None where that is not how to grade.

    One pass over the batch scores all answers behind their prompts, which are not generated.
    """
    if not batch.ranked:
        return [None] * len(batch.queries)
    prompts = right_padded(batch.inputs)
    cut = torch.tensor([ranked.cut for ranked in batch.ranked], device=prompts.lengths.device)
    scores = score_responses(
        model, prompts._replace(lengths=prompts.lengths - cut), [ranked.tokens for ranked in batch.ranked]
    )
    there = scores.lengths > 0
    mean = (scores.total / scores.lengths.clamp(min=1)).masked_fill(~there, -torch.inf)
    right = (mean[:, :1] > mean[:, 1:]).all(1).tolist()
    graded = [batch.grading.ranks(query.answer_type) for query in batch.queries]
    return [r if by_ranking else None for r, by_ranking in zip(right, graded, strict=True)]


def tokenizer_of(module: L.LightningModule) -> Any:
    """The tokenizer of the data that the module is being run on."""
    return module.trainer.datamodule.processor.tokenizer  # type: ignore[attr-defined]
