"""Pure functions that compare the responses to a query: losses of pairs and the terms of a ranking's likelihood.

Arguments are log-likelihoods of whole responses, log p(response | image, question), in the dtype to compute in; `ref_` are those
of the frozen reference. Losses of pairs are elementwise and unreduced, and broadcast. With

    h = (chosen - ref_chosen) - (rejected - ref_rejected)

their formulas are those of the papers that they name.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TIE = 1e-5
"""Distances that differ by at most this are equal: in floats 0.3 - 0.2 is not 0.2 - 0.1."""


def log_ratio_difference(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> Tensor:
    """h: the policy's preference for the chosen response minus the reference's."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def logistic(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(margin) - e log sigmoid(-margin), where e is the probability that a label is flipped."""
    loss = -F.logsigmoid(margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)
    return loss


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(beta h), smoothed as in `logistic` (arXiv 2305.18290, equation 7)."""
    h = log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected)
    return logistic(beta * h, label_smoothing)


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma), of log-likelihoods *per token* (arXiv 2405.14734, equation 6)."""
    return logistic(beta * (chosen - rejected) - gamma)


def ipo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17)."""
    h = log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected)
    return (h - 1 / (2 * beta)) ** 2


def odpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    distance: Tensor,
    beta: float,
    offset: float,
) -> Tensor:
    """-log sigmoid(beta h - offset * distance) (arXiv 2402.10571)."""
    h = log_ratio_difference(chosen, rejected, ref_chosen, ref_rejected)
    return logistic(beta * h - offset * distance)


def plackett_luce(scores: Tensor, distance: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Terms of the Plackett-Luce likelihood of ranking candidates by rising distance.

    The term of candidate i is the negative log-probability of picking it among itself and all candidates that are strictly
    further away:

        log( exp s_i + sum_{j: d_j > d_i} exp s_j ) - s_i

    Equally distant candidates (see `TIE`) are never in each other's denominator: the order of two levels just above and
    just below the target is unknown, so neither is pushed below the other. Without ties the terms add up to the
    plain Plackett-Luce negative log-likelihood.

    Args:
        scores: float [B, K], finite even where padded.
        distance: float [B, K], finite even where padded.
        valid: bool [B, K], False for padding.

    Returns:
        the terms, float [B, K], and which of them count, bool [B, K]: those of valid candidates with a valid candidate
        further away.
    """
    further = distance[:, None, :] > distance[:, :, None] + TIE
    further = further & valid[:, None, :] & valid[:, :, None]
    pool = further | torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    terms = torch.where(pool, scores[:, None, :], -torch.inf).logsumexp(-1) - scores
    return terms, further.any(-1)
