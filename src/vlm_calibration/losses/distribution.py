"""Losses of the policy's distribution over the confidences that can be stated, and over answers with them.

For one query with the target t, over the candidates k that give the query's own answer and state the confidence c_k:

    s_k = log p(text of c_k | image, question, answer) = policy_k - answer_k
    pi  = softmax_k(s), the policy's distribution over these confidences
    Z   = logsumexp_k(s), the log-probability that any of their texts follows the answer; at most 0

The text of a confidence includes its format and the end of the turn. pi does not change when all its texts become unlikely, so
each loss adds -Z, which is least at Z = 0, where every answer is followed by a readable confidence. All probabilities are relative
to the candidates compared: give all confidences that can be stated (`pairs.rejected: all`).

The answer's tokens cancel in s: `SoftLabel`, `TokenizedBrier` and `ExpectedBrier` teach the confidence, not the answer.
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

    Optimum: pi = q and Z = 0; for targets that vary at the same input, pi is the mean of their q. Of two answers of which exactly
    one is correct, the opposite is correct with probability 1 - t: the same term with this target, over the candidates that give
    the opposite answer, is added with a weight. It teaches that confidence is about the answer, not about the evidence alone.

    Args:
        width: standard deviation of q before it is restricted to the candidates, in [0.001, 1]; far below the
            distance between confidences, q is the one nearest to t.
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

    It is a proper score of t = 1 for a correct answer and t = 0 for a wrong one, as in the paper, where a confidence is one token
    and -Z is not needed. Optimum: all of pi on the confidence nearest to E[t] at the same input, and Z = 0.
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

    The reward of a response is that of the paper, of its answer's correctness y_k (0 or 1) and the stated confidence:

        R_k = y_k - (c_k - y_k)^2

    With L_k the log p of the whole response and P = softmax(L), both over all candidates, whatever their answer, the loss is

        -sum_k P_k R_k - logsumexp_k(L_k)

    The gradient of the first term is exactly the expectation, over a response k drawn from P, of REINFORCE's estimate
    -R_k grad log P_k: the policy gradient of one on-policy step, restricted to the candidates, without sampling noise, clipping,
    division by the reward's deviation or a KL penalty. The second term is -log p(any candidate is written) and teaches the format.

    A query whose candidates all give its own answer (an open question) has nothing to choose an answer from. There L_k is
    s_k = log p(text of c_k | answer): P is the same, and the answer's tokens get no gradient. `target` is not used.

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
