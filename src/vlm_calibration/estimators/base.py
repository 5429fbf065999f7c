"""What every estimator of confidence offers, and what it is given: a batch of queries with a model's answers.

All estimators rate the answer that the model gave; none changes it. What they cost is counted in forward passes of the
language model for each query, as if nothing else were asked of it: responses to one prompt that are scored together are one
pass, and each token that is generated is one. Passes behind a prompt that was read before are short, since its keys and
values are kept, and frozen vision runs once for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from vlm_calibration.data.collate import ChatFormat, PromptBatch
from vlm_calibration.estimators.answer_scoring import AnswerWriter, ResponsePass, right_padded, score_answers
from vlm_calibration.estimators.cached import PromptCache
from vlm_calibration.models.shared_prefix import Prompts
from vlm_calibration.perturbation.levels import ConfidenceLevels
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.text.confidence import strip_confidence


class Estimate(NamedTuple):
    """confidence: of each of B answers, in [0, 1], None where there is none. passes: forward passes of each query."""

    confidence: list[float | None]
    passes: list[int]


@dataclass(frozen=True, eq=False)
class AnsweredBatch:
    """A batch that a model has answered.

    Attributes:
        model: a transformers or peft model, with the adapter active that gave the answers.
        batch: the prompts, padded on the left. predictions: the answers to them.
        answer_passes: how many forward passes each answer took.
        writer: writes responses, with the confidences that may be stated.
        max_new_tokens: length limit of an answer.
        known: what generating the answers remembers of the prompts, None if nothing.
    """

    model: Any
    batch: PromptBatch
    predictions: Sequence[Prediction]
    answer_passes: Sequence[int]
    writer: AnswerWriter
    max_new_tokens: int
    known: PromptCache | None = None

    @property
    def chat(self) -> ChatFormat:
        """How prompts and responses are written."""
        return self.writer.chat

    @cached_property
    def prompts(self) -> Prompts:
        """The prompts padded on the right, for responses to follow."""
        return right_padded(self.batch.inputs)

    @cached_property
    def answers(self) -> list[str | None]:
        """What each answer says without a statement of confidence, None where nothing is left of it to rate."""
        image = getattr(self.chat.processor, "image_token", None)
        texts = [strip_confidence(p.text) for p in self.predictions]
        # A model may spell the image token, and would then be shown an image that is not there.
        return [text if text and not (image and image in text) else None for text in texts]

    @cached_property
    def scored(self) -> list[ResponsePass | None]:
        """The one pass over each answer with every level behind it; None where there is no answer."""
        # A query without an answer keeps its row, and what comes of it is dropped.
        pairs = zip(self.batch.queries, self.answers, strict=True)
        written = [self.writer.write(query, answer or query.answer) for query, answer in pairs]
        found = score_answers(self.model, written, self.prompts, self.known)
        return [f if a is not None else None for f, a in zip(found, self.answers, strict=True)]


class Estimator(ABC):
    """One way to be confident of an answer.

    Attributes:
        name: the key of its confidences in `predictions.jsonl`, and behind the "@" in `metrics.json`.
        levels: the confidences that it ranges over are those of any of these; none: those of the data's noise.
    """

    name: ClassVar[str]
    levels: Sequence[ConfidenceLevels] = ()

    @abstractmethod
    def estimate(self, answered: AnsweredBatch) -> Estimate:
        """The confidence in each answer of a batch; within `torch.no_grad` or inference mode."""


def named(estimators: Sequence[Estimator]) -> dict[str, Estimator]:
    """Estimators by their names.

    Raises:
        DataError: a name comes twice.
    """
    found: dict[str, Estimator] = {}
    for estimator in estimators:
        if estimator.name in found:
            raise DataError(f"model.estimators: {estimator.name!r} is there already")
        found[estimator.name] = estimator
    return found
