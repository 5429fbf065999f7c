"""Likelihood of responses, from the logits at their tokens alone."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
"""Label of a token that no loss is taken on."""


def token_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of each target token, float32 [N].

    Args:
        logits: float [N, V], the scores that predict each target. targets: int64 [N].
    """
    return -F.cross_entropy(logits.float(), targets, reduction="none")


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
