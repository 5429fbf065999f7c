"""The answers of stage 2's reference to the images of a batch, and the candidates that give these answers.

Confidence is stated about the model's own answer, so it is learnt on own answers: with gold answers a model learns how confident
to be of answers that it would not give. The reference generates them within the training step, on the same perturbed images.
Its scores of all candidates, and those of its teacher, come from one pass after the cached prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vlm_calibration.data.candidates import CandidateBatch
from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode in the block: in train mode, gradient checkpointing disables the cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def own_answers(
    model: Any, batch: PromptBatch, tokenizer: AnswerTokenizer, max_new_tokens: int
) -> AnsweredBatch:
    """The greedy, graded answers of the active adapter to B prompts, with the cache of their prompts.

    An answer that is cut off at `max_new_tokens` is empty: with an end that the model did not give it, it would be another answer.
    Call it in eval mode and under `torch.no_grad`.
    """
    answered = AnsweredBatch.generate(model, batch, tokenizer, max_new_tokens)
    rated = [
        answer if complete else replace(answer, text="", predicted=None, confidence=None, correct=False)
        for answer, complete in zip(answered.predictions, answered.complete, strict=True)
    ]
    return replace(answered, predictions=rated)


def own_candidates(answered: AnsweredBatch) -> CandidateBatch:
    """The candidates that give the answers of a batch; those of a query without an answer give its gold answer."""
    batch, answers = answered.batch, answered.scored_answers.answers
    cut = torch.tensor([a.cut - a.offset for a in answers], device=answered.prompts.lengths.device)
    return CandidateBatch(
        dict(answered.prompts.inputs),
        answered.prompts.lengths - cut,
        tuple(a.candidates for a in answers),
        batch.levels,
        tuple(p.correct for p in answered.predictions),
        batch.epochs,
        batch.queries,
        batch.skipped,
        answered.complete.count(False),
    )
