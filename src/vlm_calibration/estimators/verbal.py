"""Verbalized confidence: the stated one, and the mean over all that could be stated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_calibration.estimators.base import AnsweredBatch, Estimate, Estimator
from vlm_calibration.estimators.predictions import EXPECTED
from vlm_calibration.records import VERBALIZED


class VerbalizedConfidence(Estimator):
    """The confidence that the answer states (Lin et al., arXiv 2205.14334); its passes are those of the answer.

    Every evaluation includes it, as the key `confidence`.
    """

    name = VERBALIZED

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        return Estimate([p.confidence for p in answered.predictions], list(answered.answer_passes))


class ExpectedConfidence(Estimator):
    r"""The mean of the confidences that the model can state after its own answer a.

    .. math:: \sum_k c_k \, p(c_k \mid v, q, a) \quad\text{with}\quad p(c_k \mid v, q, a) \propto p(a, c_k \mid v, q)

    They are every whole percent, or stage 2's candidates in its training, and all are scored in one pass.
    """

    name = EXPECTED

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        scored = answered.scored
        confidence = [expected_confidence(s.levels, s.level_log_p) if s else None for s in scored]
        return Estimate(confidence, [s.passes if s else 1 for s in scored])


def rounded(confidence: float | None) -> float | None:
    """The confidence, if there is one, rounded to a millionth; further digits depend on the batch size."""
    return None if confidence is None else round(confidence, 6)


def expected_confidence(levels: Sequence[float], log_p: Tensor) -> float:
    """The mean of K confidences by their log-probabilities, float [K], which need not be normalised."""
    p = torch.softmax(log_p.double(), -1)
    mean = float((p * torch.tensor(levels, dtype=torch.float64)).sum())
    # Rounding can move the mean just outside the levels.
    return min(max(mean, min(levels)), max(levels))
