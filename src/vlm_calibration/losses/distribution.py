"""Losses of the policy's distribution over the confidences that can be stated, and over answers with them.

For one query with the target t, over the candidates k that give the query's own answer and state the confidence c_k:

    s_k = log p(text of c_k | image, question, answer) = policy_k - answer_k
    pi  = softmax_k(s), the policy's distribution over these confidences
    Z   = logsumexp_k(s), the log-probability that any of their texts follows the answer; at most 0

The text of a confidence includes its format and the end of the turn. Each loss adds -Z: pi stays the same when all its texts become
unlikely. Give all confidences that can be stated as candidates (`pairs.rejected: all`), since pi is relative to them. The answer's
tokens cancel in s, so that only `RLCR` teaches the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_calibration.losses.candidates import CandidateLoss, CandidateScores


def _distribution(scores: CandidateScores) -> tuple[Tensor, Tensor]:
    """pi, float [B, K], which is 0 for candidates that do not give the own answer, and Z, float [B]."""
    s = (scores.policy - scores.answer).masked_fill(~scores.own, -torch.inf)
    return s.softmax(-1), s.logsumexp(-1)


class DistributionLoss(CandidateLoss):
    """Base class of the losses of the distribution over all candidates."""


@dataclass(frozen=True)
class SoftLabel(DistributionLoss):
    """Cross-entropy to a distribution around the target, for the own answer and for its opposite:

        -sum_k q_k s_k = -sum_k q_k log pi_k - Z,   q_k proportional to exp(-((c_k - t) / width)^2 / 2)

    Optimum: pi = q and Z = 0; for targets that vary at the same input, pi is the mean of their q. The opposite answer is correct with
    probability 1 - t: its term teaches that confidence is about the answer, not about the evidence alone.

    Args:
        width: standard deviation of q, in [0.001, 1]; far below the distance between confidences, q is the one nearest to t.
        opposite_weight: weight of the opposite answer's term, at least 0.
    """

    width: float = 0.05
    opposite_weight: float = 0.0

    def forward(self, scores: CandidateScores) -> Tensor:
        loss = self._cross_entropy(scores, scores.target, scores.own)
        if self.opposite_weight:
            opposite = self._cross_entropy(scores, 1 - scores.target, scores.valid & ~scores.own)
            loss = loss + self.opposite_weight * opposite
        return loss.mean()

    def _cross_entropy(self, scores: CandidateScores, target: Tensor, among: Tensor) -> Tensor:
        """Float [B], over the candidates in the mask `among`, bool [B, K]; 0 for a query without any."""
        log_q = -(((scores.confidence - target[:, None]) / self.width) ** 2) / 2
        q = log_q.masked_fill(~among, -torch.inf).softmax(-1).nan_to_num(0.0)
        return -(q * (scores.policy - scores.answer)).sum(-1)


@dataclass(frozen=True)
class TokenizedBrier(DistributionLoss):
    """The tokenized Brier score (ConfTuner, arXiv 2508.18847), the expected squared error of a sampled confidence:

        sum_k pi_k (c_k - t)^2 - Z

    In the paper t is 1 for a correct answer and 0 for a wrong one, and a confidence is one token, which needs no -Z. Optimum: all of
    pi on the confidence nearest to E[t] at the same input, and Z = 0.
    """

    def forward(self, scores: CandidateScores) -> Tensor:
        pi, z = _distribution(scores)
        error = scores.confidence - scores.target[:, None]
        return ((pi * error**2).sum(-1) - z).mean()


@dataclass(frozen=True)
class ExpectedBrier(DistributionLoss):
    """The squared error of the mean confidence:

        (sum_k pi_k c_k - t)^2 - Z

    Optimum: the mean of pi is E[t] at the same input (or the nearest confidence, if E[t] is outside their range), and Z = 0. It
    leaves open which pi has this mean, so the most likely confidence may be another one: read the mean out, not the mode.
    """

    def forward(self, scores: CandidateScores) -> Tensor:
        pi, z = _distribution(scores)
        mean = (pi * scores.confidence).sum(-1)
        return ((mean - scores.target) ** 2 - z).mean()


@dataclass(frozen=True)
class RLCR(DistributionLoss):
    """Reinforcement learning with calibration rewards (RLCR, arXiv 2507.16806), enumerated instead of sampled.

    With the answer's correctness y_k (0 or 1), the log p of the whole response L_k, and P = softmax(L), over all candidates,
    whatever their answer, the paper's reward and the loss are

        R_k = y_k - (c_k - y_k)^2
        -sum_k P_k R_k - logsumexp_k(L_k)

    The gradient of the first term is exactly the policy gradient of one on-policy step, E_P[-R_k grad log P_k], without sampling
    noise, clipping, division by the reward's deviation or a KL penalty. The second term, -log p(any candidate), teaches the format.

    If all candidates give the own answer (an open question), L_k is s_k: P is the same, and the answer's tokens get no gradient.
    `target` is not used.

    Optimum: all of P on the confidence nearest to p, after the answer with the highest probability p of being correct (if the
    confidences are dense enough to tell its p from that of the next answer).
    """

    def forward(self, scores: CandidateScores) -> Tensor:
        others = (scores.valid & ~scores.own).any(-1, keepdim=True)
        log_p = torch.where(others, scores.policy, scores.policy - scores.answer)
        log_p = log_p.masked_fill(~scores.valid, -torch.inf)
        correct = scores.correct.to(log_p.dtype)
        reward = correct - (scores.confidence - correct) ** 2
        return -((log_p.softmax(-1) * reward).sum(-1) + log_p.logsumexp(-1)).mean()
