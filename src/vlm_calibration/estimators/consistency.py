"""Self-consistency: how often sampled answers agree with the given one."""

from __future__ import annotations

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from transformers import LogitsProcessor

from vlm_calibration.data.noise import query_rng
from vlm_calibration.estimators.base import AnsweredBatch, Estimate, Estimator
from vlm_calibration.models.generation import Generated, generate
from vlm_calibration.records import Prediction
from vlm_calibration.text.confidence import end_of_confidence
from vlm_calibration.text.grading import EXACT, Grading, grade


class InverseTransformSampler(LogitsProcessor):
    """Samples one token per row by inverse transform sampling, so that a row's tokens do not depend on the rest of the batch.

    Token t is the one at which the cumulative distribution exceeds the row's t-th number.

    Args:
        temperature: divisor of the logits, above 0.
        numbers: float64 [B, T] in [0, 1), one per token.
        prompt_length: length of a padded prompt in tokens.
    """

    def __init__(self, temperature: float, numbers: Tensor, prompt_length: int) -> None:
        self.temperature = temperature
        self.numbers = numbers
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        dtype = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no float64
        cumulative = torch.softmax(scores.to(dtype) / self.temperature, -1).cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.prompt_length].to(scores.device, dtype)
        # Rounding keeps the total from being exactly 1, so numbers are scaled by it, and no token after the last one with
        # any probability is sampled.
        token = torch.searchsorted(cumulative, (number * cumulative[:, -1])[:, None], right=True)
        token = torch.minimum(token, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class SelfConsistency(Estimator):
    """The share of sampled answers that agree with the one given (Wang et al., arXiv 2203.11171).

    The paper answers with the majority of its samples; here the greedy answer stays, and its confidence is the share of samples
    that grading takes for the same answer. An unparsed sample disagrees, and an unparsed answer has no confidence. The samples
    are a function of (seed, query id) alone.

    Args:
        samples: number of sampled answers per query.
        temperature: temperature of the sampled distribution.
        seed: seed of the samples.
    """

    name = "self_consistency"

    def __init__(
        self, samples: PositiveInt = 10, temperature: PositiveFloat = 0.7, seed: NonNegativeInt = 0
    ) -> None:
        self.samples = samples
        self.temperature = temperature
        self.seed = seed

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        n = len(answered.predictions)
        agreeing, passes = [0] * n, [0] * n
        for sample in range(self.samples):
            sampled = self._sample(answered, sample)
            for row, prediction in enumerate(answered.predictions):
                agreeing[row] += agrees(prediction, sampled.texts[row], answered.batch.grading or EXACT)
                passes[row] += sampled.passes[row]
        counts = zip(agreeing, answered.predictions, strict=True)
        return Estimate([k / self.samples if p.predicted else None for k, p in counts], passes)

    def _sample(self, answered: AnsweredBatch, sample: int) -> Generated:
        """One sampled answer to each query."""
        inputs, limit = answered.batch.inputs, answered.max_new_tokens
        rngs = [query_rng(self.seed, sample, query.id, self.name) for query in answered.batch.queries]
        numbers = torch.stack([torch.from_numpy(rng.random(limit)) for rng in rngs])
        sampler = InverseTransformSampler(self.temperature, numbers, inputs["input_ids"].shape[1])
        tokenizer = answered.chat.processor.tokenizer
        return generate(answered.model, inputs, tokenizer, limit, end_of_confidence, sampler)


def agrees(prediction: Prediction, text: str, grading: Grading) -> bool:
    """Whether grading takes a text for the same answer as a prediction's."""
    if not prediction.predicted:
        return False
    predicted, kind, question = prediction.predicted, prediction.answer_type, prediction.question
    return grade(text, predicted, kind, grading=grading, question=question).correct
