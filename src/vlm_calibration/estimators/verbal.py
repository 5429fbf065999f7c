"""Verbalized confidence: the stated one, and the mean over all that could be stated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_calibration.estimators.answer_scoring import ResponsePass
from vlm_calibration.estimators.base import AnsweredBatch, Estimate, Estimator
from vlm_calibration.estimators.predictions import VERBALIZED
from vlm_calibration.perturbation.levels import ConfidenceLevels
from vlm_calibration.text.confidence import render_response


class VerbalizedConfidence(Estimator):
    """The confidence that the answer states (Lin et al., arXiv 2205.14334); its passes are those of the answer.

    Every evaluation includes it, as the key `confidence`.
    """

    name = VERBALIZED

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        return Estimate([p.confidence for p in answered.predictions], list(answered.answer_passes))


class ExpectedConfidence(Estimator):
    r"""The mean of the levels that the model can state after its own answer a.

    .. math:: \sum_k c_k \, p(c_k \mid v, q, a) \quad\text{with}\quad p(c_k \mid v, q, a) \propto p(a, c_k \mid v, q)

    All levels are scored in one pass. Greedy decoding states the mode of this distribution; the calibrated statement is its
    mean.

    Args:
        levels: scales whose levels are averaged, beside the scale of the data's noise. Use the levels that the model was taught, and
            for several models those of all of them.
    """

    name = "expected"

    def __init__(self, levels: list[ConfidenceLevels] | None = None) -> None:
        self.levels = levels or []

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        confidence: list[float | None] = []
        for scores in answered.scored:
            confidence.append(None if scores is None else _mean(scores.levels, scores.level_log_p))
        return Estimate(confidence, [scores.passes if scores else 1 for scores in answered.scored])


def expected_over(levels: Sequence[float], scores: ResponsePass) -> float:
    """The mean of some confidences, as an evaluation that scores these alone writes it into `predictions.jsonl`.

    Args:
        levels: confidences; in an answer each is stated as a whole percent.
        scores: of every whole percent.
    """
    log_p = {
        render_response("", c): value for c, value in zip(scores.levels, scores.level_log_p, strict=True)
    }
    stated = torch.stack([log_p[render_response("", c)] for c in levels])
    return rounded(_mean(levels, stated))


def rounded(confidence: float) -> float:
    """The confidence rounded to a millionth; further digits depend on the batch size."""
    return round(confidence, 6)


def _mean(levels: Sequence[float], log_p: Tensor) -> float:
    """The mean of K confidences by their log-probabilities, float [K]."""
    p = torch.softmax(log_p.double(), -1)
    mean = float((p * torch.tensor(levels, dtype=torch.float64)).sum())
    # Rounding can move the mean just outside the levels.
    return min(max(mean, min(levels)), max(levels))
