"""The interface of a confidence estimator, and its input: a batch of queries with a model's answers.

An estimator rates the given answer and does not change it. Its cost is the number of forward passes of the language model per
query, as if it ran alone: responses that are scored together are one pass, and so is each generated token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from vlm_calibration.data.collate import ChatFormat, PromptBatch, move
from vlm_calibration.data.noise import ImageCopy
from vlm_calibration.estimators.answer_scoring import (
    AnswerTokenizer,
    ResponsePass,
    ScoredAnswers,
    TokenizedAnswer,
    right_padded,
    score_answers,
)
from vlm_calibration.estimators.cached import PromptCache
from vlm_calibration.estimators.generating import GenerationRecorder, answer_batch
from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.models.shared_prefix import Prompts
from vlm_calibration.text.confidence import strip_confidence


class Estimate(NamedTuple):
    """The confidence in [0, 1] in each of B answers, None for an answer without one; and its forward passes."""

    confidence: list[float | None]
    passes: list[int]


@dataclass(frozen=True, eq=False)
class AnsweredBatch:
    """A batch with a model's answers.

    Attributes:
        model: a transformers or peft model; the adapter that gave the answers is active.
        batch: B prompts, padded on the left.
        predictions: B answers.
        answer_passes: number of forward passes for each answer.
        tokenizer: tokenizes answers with the confidences that can be stated.
        max_new_tokens: length limit of an answer.
        cache: keys and values of the prompts from generation, or None.
        complete: for each answer whether it ends before the limit cuts it off; empty if that is not known.
    """

    model: Any
    batch: PromptBatch
    predictions: Sequence[EstimatedPrediction]
    answer_passes: Sequence[int]
    tokenizer: AnswerTokenizer
    max_new_tokens: int
    cache: PromptCache | None = None
    complete: Sequence[bool] = ()

    @staticmethod
    def generate(
        model: Any,
        batch: PromptBatch,
        tokenizer: AnswerTokenizer,
        max_new_tokens: int,
        keep_cache: bool = True,
    ) -> AnsweredBatch:
        """The greedy answers of the active adapter. Call it in eval mode and under `torch.no_grad`.

        `keep_cache` keeps what generation computed of the prompts, for estimators.
        """
        recorder = GenerationRecorder(model, keep_cache=keep_cache)
        answers = answer_batch(recorder, batch, tokenizer.chat.processor.tokenizer, max_new_tokens)
        passes, cache, complete = recorder.passes, recorder.cache, recorder.complete
        return AnsweredBatch(model, batch, answers, passes, tokenizer, max_new_tokens, cache, complete)

    @property
    def chat(self) -> ChatFormat:
        return self.tokenizer.chat

    @cached_property
    def prompts(self) -> Prompts:
        """The prompts, padded on the right."""
        return right_padded(self.batch.inputs)

    @cached_property
    def answers(self) -> list[str | None]:
        """For each query the answer without its stated confidence; None if there is no answer left to rate."""
        image = getattr(self.chat.processor, "image_token", None)
        texts = [strip_confidence(p.text) for p in self.predictions]
        # An answer that spells the image token would be tokenized as an image.
        return [text if text and not (image and image in text) else None for text in texts]

    @cached_property
    def scored_answers(self) -> ScoredAnswers:
        """The scores of each answer with every level, in one pass; of the gold answer for a query without an answer."""
        return score_answers(self.model, self._tokenized, self.prompts, self.cache)

    @cached_property
    def scored(self) -> list[ResponsePass | None]:
        """For each query the scores of its answer with every level; None without an answer."""
        scores = zip(self.scored_answers.by_answer(), self.answers, strict=True)
        return [s if answer is not None else None for s, answer in scores]

    def score_copy(self, copy: ImageCopy, *, with_levels: bool) -> dict[int, ResponsePass]:
        """Score each answer with a perturbed copy of its image, in one pass.

        Args:
            copy: the copy.
            with_levels: with every level after the answer, or with one, for scores that do not depend on them.

        Returns:
            Row -> scores, for the queries whose image has the copy; those without an answer are scored with the gold answer.

        Raises:
            ValueError: the copies were not made, which `PerturbedQueryDataModule` does for an `EvaluationModule`.
        """
        copied = self.batch.copies.get(copy)
        if copied is None:
            raise ValueError(f"a batch without the copies of its images that are to be scored: {copy}")
        if not copied.rows:
            return {}
        answers = [self._tokenized[row] for row in copied.rows]
        if not with_levels:
            answers = [answer.without_levels() for answer in answers]
        inputs = move(copied.inputs, self.batch.inputs["input_ids"].device)
        scores = score_answers(self.model, answers, right_padded(inputs))
        return dict(zip(copied.rows, scores.by_answer(), strict=True))

    @cached_property
    def _tokenized(self) -> list[TokenizedAnswer]:
        pairs = zip(self.batch.queries, self.answers, strict=True)
        return [self.tokenizer.tokenize(query, answer or query.answer) for query, answer in pairs]


class Estimator(ABC):
    """Estimates the confidence in an answer.

    Attributes:
        name: its key in `predictions.jsonl`, and the suffix after "@" in `metrics.json`.
        copies: the perturbed copies of each image that it needs.
    """

    name: ClassVar[str]
    copies: Sequence[ImageCopy] = ()

    @abstractmethod
    def estimate(self, answered: AnsweredBatch) -> Estimate:
        """The confidence in each answer of a batch. Call it under `torch.no_grad` or in inference mode."""
