"""Scores of the candidate responses to each query, and the base class of the losses of stage 2, which take them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from vlm_calibration.records import DataError


class CandidateScores(NamedTuple):
    """Log-likelihoods of K candidate responses to each of B queries; column 0 is the one nearest to the target, the chosen one.

    A response is an answer, then a confidence. `policy` and `answer` come from the same token log-likelihoods: in
    `policy - answer` the answer's tokens cancel, also in the gradient.

    Attributes:
        policy: float [B, K], log p of the response.
        reference: float [B, K], the same under the frozen reference, or None.
        lengths: [B, K], number of tokens, at least 1.
        distance: float [B, K] in [0, 1], |stated level - target level|; 0 for the chosen response, 1 for another answer.
        valid: bool [B, K], False for padding, whose numbers may be anything; column 0 is always valid.
        answer: float [B, K], log p of the answer; `policy - answer` is that of the confidence, its format and the end of the turn.
        confidence: float [B, K] in [0, 1], the stated confidence.
        target: float [B] in [0, 1], the confidence to learn.
        correct: bool [B, K], whether the response's answer is correct.
        own: bool [B, K], whether the response gives the query's answer, and not another one; column 0 always does.
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor
    distance: Tensor
    valid: Tensor
    answer: Tensor
    confidence: Tensor
    target: Tensor
    correct: Tensor
    own: Tensor


def fill_padding(scores: CandidateScores) -> CandidateScores:
    """Convert scores to at least float32, and replace padding by finite numbers and by False.

    The gradient of an inf or nan that is only masked after the arithmetic is nan.
    """
    valid, dtype = scores.valid, torch.promote_types(scores.policy.dtype, torch.float32)

    def fill(values: Tensor, padding: float = 0.0) -> Tensor:
        return torch.where(valid, values.to(dtype), padding)

    return scores._replace(
        policy=fill(scores.policy),
        reference=None if scores.reference is None else fill(scores.reference),
        lengths=fill(scores.lengths, 1.0),
        distance=fill(scores.distance),
        answer=fill(scores.answer),
        confidence=fill(scores.confidence),
        target=scores.target.to(dtype),
        correct=valid & scores.correct,
        own=valid & scores.own,
    )


_RULES = {
    "beta": (lambda value: 0 < value < math.inf, "a finite number above 0"),
    "gamma": (lambda value: 0 <= value < math.inf, "a finite number of at least 0"),
    "offset": (lambda value: 0 <= value < math.inf, "a finite number of at least 0"),
    "opposite_weight": (lambda value: 0 <= value < math.inf, "a finite number of at least 0"),
    "width": (lambda value: 0.001 <= value <= 1, "in [0.001, 1]"),
}


class CandidateLoss(ABC):
    """Base class of the losses of candidate scores. Every query has the same weight, whatever its number of candidates."""

    needs_reference = False
    """Whether `CandidateScores.reference` is used."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in _RULES and not _RULES[name][0](value):
                raise DataError(f"loss.{name} must be {_RULES[name][1]}, found {value}")

    def __call__(self, scores: CandidateScores) -> Tensor:
        """The loss, a scalar of at least float32."""
        return self.forward(fill_padding(scores))

    @abstractmethod
    def forward(self, scores: CandidateScores) -> Tensor:
        """The loss of scores whose padding is filled (`fill_padding`)."""

    def rewards(self, scores: CandidateScores) -> Tensor:
        """Reward of each candidate, float [B, K]: its log-likelihood; 0 for padding, which is filled."""
        return scores.policy
