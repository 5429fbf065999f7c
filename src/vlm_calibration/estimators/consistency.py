"""Self-consistency: how often sampled answers agree with the given one."""

from __future__ import annotations

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from vlm_calibration.data.noise import query_rng
from vlm_calibration.estimators.base import AnsweredBatch, Estimate, Estimator
from vlm_calibration.models.generation import Sampler, generate
from vlm_calibration.text.confidence import end_of_confidence
from vlm_calibration.text.grading import EXACT, grade


def inverse_transform_sampler(temperature: float, numbers: Tensor, prompt_length: int) -> Sampler:
    """A logits processor that samples one token per row, so that a row's tokens do not depend on the rest of the batch.

    Token t is the one at which the cumulative distribution exceeds the row's t-th number, float64 [B, T] in [0, 1).
    """

    def sample(input_ids: Tensor, scores: Tensor) -> Tensor:
        dtype = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no float64
        cumulative = torch.softmax(scores.to(dtype) / temperature, -1).cumsum(-1)
        number = numbers[:, input_ids.shape[1] - prompt_length].to(scores.device, dtype)
        # The total is not exactly 1: numbers are scaled by it, and no token after the last one with any probability is sampled.
        token = torch.searchsorted(cumulative, (number * cumulative[:, -1])[:, None], right=True)
        token = torch.minimum(token, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    return sample


class SelfConsistency(Estimator):
    """The share of sampled answers that agree with the one given (Wang et al., arXiv 2203.11171).

    The paper answers with the majority of its samples; here the greedy answer stays. An unparsed sample disagrees, and an unparsed answer
    has no confidence. The samples are a function of (seed, query id) alone.

    Args:
        samples: number of sampled answers per query.
        temperature: temperature of the sampled distribution.
        seed: seed of the samples.
    """

    name = "self_consistency"

    def __init__(
        self, samples: PositiveInt = 10, temperature: PositiveFloat = 0.7, seed: NonNegativeInt = 0
    ) -> None:
        self.samples, self.temperature, self.seed = samples, temperature, seed

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        inputs, limit, n = answered.batch.inputs, answered.max_new_tokens, len(answered.predictions)
        tokenizer = answered.chat.processor.tokenizer
        agreeing, passes, grading = [0] * n, [0] * n, answered.batch.grading or EXACT
        for sample in range(self.samples):
            rngs = [query_rng(self.seed, sample, query.id, self.name) for query in answered.batch.queries]
            numbers = torch.stack([torch.from_numpy(rng.random(limit)) for rng in rngs])
            sampler = inverse_transform_sampler(self.temperature, numbers, inputs["input_ids"].shape[1])
            sampled = generate(answered.model, inputs, tokenizer, limit, end_of_confidence, sampler)
            for row, prediction in enumerate(answered.predictions):
                passes[row] += sampled.passes[row]
                if given := prediction.predicted:
                    kind, question = prediction.answer_type, prediction.question
                    agreeing[row] += grade(sampled.texts[row], given, kind, (), grading, question).correct
        counts = zip(agreeing, answered.predictions, strict=True)
        return Estimate([k / self.samples if p.predicted else None for k, p in counts], passes)
