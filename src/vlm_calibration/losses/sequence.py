"""Likelihood of responses, from the logits at their tokens alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
"""Label of a token that no loss is taken on."""
AnswerWeight = Literal["constant", "confidence"]
"""What the tokens of a correct answer weigh in a loss: 1, or the confidence to state."""


def token_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of each target token, float32 [N].

    Args:
        logits: float [N, V], the scores that predict each target. targets: int64 [N].
    """
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def token_weights(
    stated: Tensor, confidence: Tensor, right: Tensor, answer_weight: AnswerWeight, confidence_weight: float
) -> Tensor:
    """Weight of each response token in the loss, float32 of the shape of `stated`.

    The tokens of a wrong answer weigh 0: it is there to be doubted, not to be learnt.

    Args:
        stated: bool, whether the token belongs to the confidence, and not to the answer.
        confidence: float32 in [0, 1], the confidence to state. right: bool, whether the answer is correct. Both broadcast
            to the shape of `stated`.
        answer_weight: weight of an answer's tokens. confidence_weight: weight of a confidence's tokens, at least 0.
    """
    answer = torch.ones_like(confidence) if answer_weight == "constant" else confidence
    return torch.where(stated, torch.full_like(confidence, confidence_weight), answer * right)


def response_nll(log_likelihood: Tensor, rows: Tensor, weights: Tensor, n_rows: int) -> Tensor:
    """Weighted negative log-likelihood per response token, averaged over responses.

    Each response counts alike, whatever its length and whatever it is batched with, so that processes and accumulation
    steps with equally many responses average to the loss of one large batch:

        1 / B * sum_b [ sum_{t in b} -w_t log p_t / |b| ]

    Args:
        log_likelihood: float [N], of all label tokens of a batch. rows: int64 [N], which response each belongs to.
        weights: float [N]; 1 for the plain mean. n_rows: B.

    Raises:
        ValueError: a response without tokens.
    """
    lengths = log_likelihood.new_zeros(n_rows).index_add(0, rows, log_likelihood.new_ones(len(rows)))
    if n_rows == 0 or not bool((lengths > 0).all()):
        raise ValueError(f"every one of the {n_rows} responses needs at least one label token")
    sums = log_likelihood.new_zeros(n_rows).index_add(0, rows, -weights * log_likelihood)
    return (sums / lengths).mean()
