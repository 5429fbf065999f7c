"""Batches of questions with a model's answers, or with answers written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from vlm_calibration.data.collate import ChatFormat, PromptBatch, PromptCollator
from vlm_calibration.data.noise import Sample
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.estimators.generating import GenerationRecorder
from vlm_calibration.estimators.predictions import graded_prediction
from vlm_calibration.models.generation import generate_texts
from vlm_calibration.perturbation.levels import ConfidenceLevels, LinearLevels

Answering = Callable[..., AnsweredBatch]


@pytest.fixture(scope="session")
def answering() -> Answering:
    """Builds a batch with the given texts as answers, by default the model's own; `keep_cache` keeps generation's cache."""

    def answered(
        model: Any,
        chat: ChatFormat,
        samples: Sequence[Sample],
        texts: Sequence[str] | None = None,
        levels: ConfidenceLevels | None = None,
        keep_cache: bool = False,
        max_new_tokens: int = 3,
    ) -> AnsweredBatch:
        batch: PromptBatch = PromptCollator(chat)(samples)
        generating = GenerationRecorder(model, keep_cache=keep_cache)
        with torch.no_grad():
            generated = generate_texts(generating, batch.inputs, chat.processor.tokenizer, max_new_tokens)
        answers = texts or generated
        predictions = [
            graded_prediction(s.query, t, s.perturbation, s.noise_step)
            for s, t in zip(samples, answers, strict=True)
        ]
        return AnsweredBatch(
            model,
            batch,
            predictions,
            generating.passes,
            AnswerTokenizer(chat, [levels or LinearLevels()]),
            max_new_tokens,
            generating.cache,
        )

    return answered
