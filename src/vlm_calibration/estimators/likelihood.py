"""The likelihood of a model's own answer."""

from __future__ import annotations

import torch

from vlm_calibration.estimators.answer_scoring import YES_NO, ResponsePass
from vlm_calibration.estimators.base import AnsweredBatch, Estimate, Estimator


class AnswerLikelihood(Estimator):
    r"""The probability of the answer's tokens, whatever confidence follows them.

    For a yes/no question the probability of the answered word against the other one:
    :math:`p(\text{yes}) / (p(\text{yes}) + p(\text{no}))` for the answer yes; no confidence for any other answer. For other
    questions the likelihood of the answer, normalised by its length (Malinin & Gales, arXiv 2002.07650):
    :math:`\exp(\frac{1}{T} \sum_t \log p(a_t \mid a_{<t}, v, q))`. Both come from the pass of `ExpectedConfidence`.
    """

    name = "likelihood"

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        rows = zip(answered.scored, answered.predictions, strict=True)
        confidence = [likelihood_of(scores, p.predicted) if scores else None for scores, p in rows]
        return Estimate(confidence, [scores.passes if scores else 1 for scores in answered.scored])


def likelihood_of(scores: ResponsePass, predicted: str | None) -> float | None:
    """The likelihood in [0, 1] of an answer with its parsed form; None for one to a yes/no question that is neither."""
    if scores.yes_no_log_p is None:
        return min(1.0, float(scores.answer_log_p.double().mean().exp()))
    words = [word.lower() for word in YES_NO]
    if predicted not in words:
        return None
    return float(torch.softmax(scores.yes_no_log_p.double(), -1)[words.index(predicted)])
