"""Self-consistency: how often sampled answers agree with the given one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vlm_calibration.data.noise import query_rng
from vlm_calibration.estimators.base import AnsweredBatch, Estimate, Estimator
from vlm_calibration.estimators.generating import GenerationRecorder
from vlm_calibration.models.generation import generate_texts
from vlm_calibration.records import DataError, Prediction
from vlm_calibration.text.confidence import end_of_confidence
from vlm_calibration.text.grading import EXACT, Grading, grade


class InverseTransformSampler(LogitsProcessor):
    """Samples one token per row from the model's distribution by inverse transform sampling with given numbers.

    Token t is the one at which the cumulative distribution exceeds the row's t-th number. So a row's tokens do not depend on
    the rest of the batch.

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

    Raises:
        DataError: fewer than one sample, a temperature that is not above 0, or a negative seed.
    """

    name = "self_consistency"

    def __init__(self, samples: int = 10, temperature: float = 0.7, seed: int = 0) -> None:
        if samples < 1:
            raise DataError(f"SelfConsistency.samples must be at least 1, found {samples}")
        if not 0 < temperature < float("inf"):
            raise DataError(f"SelfConsistency.temperature must be above 0, found {temperature}")
        if seed < 0:
            raise DataError(f"SelfConsistency.seed must be at least 0, found {seed}")
        self.samples = samples
        self.temperature = temperature
        self.seed = seed

    def estimate(self, answered: AnsweredBatch) -> Estimate:
        agreeing = [0] * len(answered.predictions)
        passes = [0] * len(answered.predictions)
        for sample in range(self.samples):
            texts, sample_passes = self._sample(answered, sample)
            for row, (prediction, text) in enumerate(zip(answered.predictions, texts, strict=True)):
                agreeing[row] += agrees(prediction, text, answered.batch.grading or EXACT)
                passes[row] += sample_passes[row]
        counts = zip(agreeing, answered.predictions, strict=True)
        return Estimate([n / self.samples if p.predicted else None for n, p in counts], passes)

    def _sample(self, answered: AnsweredBatch, sample: int) -> tuple[list[str], list[int]]:
        """One sampled text for each query, and its forward passes."""
        inputs, limit = answered.batch.inputs, answered.max_new_tokens
        numbers = [
            torch.from_numpy(query_rng(self.seed, sample, query.id, self.name).random(limit))
            for query in answered.batch.queries
        ]
        sampler = InverseTransformSampler(
            self.temperature, torch.stack(numbers), inputs["input_ids"].shape[1]
        )
        generating = GenerationRecorder(answered.model, sampler)
        tokenizer = answered.chat.processor.tokenizer
        texts = generate_texts(generating, inputs, tokenizer, limit, end_of_confidence)
        return texts, generating.passes


def agrees(prediction: Prediction, text: str, grading: Grading) -> bool:
    """Whether grading takes a text for the same answer as a prediction's."""
    if not prediction.predicted:
        return False
    predicted, kind, question = prediction.predicted, prediction.answer_type, prediction.question
    return grade(text, predicted, kind, grading=grading, question=question).correct
