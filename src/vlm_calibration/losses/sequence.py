"""Likelihood of responses, from the logits that predict their tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
"""Label of a token without a loss."""
AnswerWeight = Literal["constant", "confidence"]
"""Weight of the tokens of a correct answer in a loss: 1, or the target confidence."""


def token_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of each target token, float32 [N], from the logits that predict it, float [N, V], and the targets, int64 [N]."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def token_weights(
    confidence_mask: Tensor,
    confidence: Tensor,
    correct: Tensor,
    answer_weight: AnswerWeight,
    confidence_weight: float,
) -> Tensor:
    """Weight of each response token in the loss, float32 of the shape of `confidence_mask`.

    The tokens of a wrong answer weigh 0: the model learns to doubt it, not to give it.

    Args:
        confidence_mask: bool, whether the token belongs to the stated confidence; else it belongs to the answer.
        confidence: float32 in [0, 1], the target confidence, which broadcasts to `confidence_mask`.
        correct: bool, whether the answer is correct; it broadcasts too.
    """
    answer = torch.ones_like(confidence) if answer_weight == "constant" else confidence
    return torch.where(confidence_mask, torch.full_like(confidence, confidence_weight), answer * correct)


def response_nll(log_likelihood: Tensor, rows: Tensor, weights: Tensor, n_rows: int) -> Tensor:
    """Weighted negative log-likelihood per response token, averaged over responses.

    Every response has the same weight, so that processes and accumulation steps with equally many average to the loss of one batch:

        1 / B * sum_b [ sum_{t in b} -w_t log p_t / |b| ]

    Args:
        log_likelihood: float [N], of all label tokens of a batch.
        rows: int64 [N], the response that each token belongs to.
        weights: float [N]; 1 for the plain mean.
        n_rows: number of responses B, each with at least one token.
    """
    lengths = log_likelihood.new_zeros(n_rows).index_add(0, rows, log_likelihood.new_ones(len(rows)))
    sums = log_likelihood.new_zeros(n_rows).index_add(0, rows, -weights * log_likelihood)
    return (sums / lengths).mean()
