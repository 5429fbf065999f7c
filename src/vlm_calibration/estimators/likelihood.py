"""How likely a model found the words of its own answer."""

from __future__ import annotations

import torch

from vlm_calibration.estimators.answer_scoring import YES_NO, ResponsePass
from vlm_calibration.estimators.base import AnsweredBatch, Estimate, Estimator


class AnswerLikelihood(Estimator):
    r"""The probability of the answer's tokens, whatever confidence is stated behind them.

    For a yes/no question, that of the word that was answered against the other one:
    :math:`p(\text{yes}) / (p(\text{yes}) + p(\text{no}))` where the answer is yes. For others the likelihood of the answer,
    normalised by its length (Malinin & Gales, arXiv 2002.07650): :math:`\exp(\frac{1}{T} \sum_t \log p(a_t \mid a_{<t}, v, q))`.
    Both come from the pass that `ExpectedConfidence` makes.

    A yes/no question that was answered with neither has no confidence.
    """

    name = "likelihood"

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        rows = zip(answered.scored, answered.predictions, strict=True)
        confidence = [_of(found, prediction.predicted) if found else None for found, prediction in rows]
        return Estimate(confidence, [found.passes if found else 1 for found in answered.scored])


def _of(found: ResponsePass, predicted: str | None) -> float | None:
    if found.yes_no_log_p is None:
        return min(1.0, float(found.answer_log_p.double().mean().exp()))
    words = [word.lower() for word in YES_NO]
    if predicted not in words:
        return None
    return float(torch.softmax(found.yes_no_log_p.double(), -1)[words.index(predicted)])
