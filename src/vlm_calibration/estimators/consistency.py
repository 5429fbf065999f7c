"""Self-consistency: how often a model gives the same answer when it is asked again and may choose its words at random."""

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


class DrawnTokens(LogitsProcessor):
    """Leaves one token for each row, drawn from the model's distribution by the row's own numbers.

    Which of a thousand rows it is in does not matter to a row, nor who else is drawn for. Token t is the one in which the
    cumulative distribution passes the row's t-th number.

    Args:
        temperature: what logits are divided by, above 0.
        numbers: float64 [B, T] in [0, 1), one for each token that may be drawn.
        prompt_length: tokens of a padded prompt.
    """

    def __init__(self, temperature: float, numbers: Tensor, prompt_length: int) -> None:
        self.temperature = temperature
        self.numbers = numbers
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wide = torch.float32 if scores.device.type == "mps" else torch.float64  # which has no float64
        reached = torch.softmax(scores.to(wide) / self.temperature, -1).cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.prompt_length].to(scores.device, wide)
        # Of the total, which rounding keeps from being 1; its last token that has any probability at most.
        token = torch.searchsorted(reached, (number * reached[:, -1])[:, None], right=True)
        token = torch.minimum(token, torch.searchsorted(reached, reached[:, -1:].contiguous()))
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class SelfConsistency(Estimator):
    """The share of sampled answers that agree with the one given (Wang et al., arXiv 2203.11171).

    The paper answers with the majority of its samples; here the answer stays the likeliest one, and the share of samples that
    grading takes for the same answer is the confidence in it. A sample in which no answer can be read disagrees. An answer
    that could not be read itself has no confidence. What is drawn is a function of (seed, query id) alone.

    Args:
        samples: answers to draw for each query.
        temperature: of the distribution that tokens are drawn from.
        seed: of what is drawn.

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
            texts, taken = self._sample(answered, sample)
            for row, (prediction, text) in enumerate(zip(answered.predictions, texts, strict=True)):
                agreeing[row] += _agrees(prediction, text, answered.batch.grading)
                passes[row] += taken[row]
        read = zip(agreeing, answered.predictions, strict=True)
        return Estimate([n / self.samples if p.predicted else None for n, p in read], passes)

    def _sample(self, answered: AnsweredBatch, sample: int) -> tuple[list[str], list[int]]:
        inputs, limit = answered.batch.inputs, answered.max_new_tokens
        drawn = DrawnTokens(
            self.temperature,
            torch.stack([self._numbers(q.id, sample, limit) for q in answered.batch.queries]),
            inputs["input_ids"].shape[1],
        )
        generating = GenerationRecorder(answered.model, drawn)
        texts = generate_texts(
            generating, inputs, answered.chat.processor.tokenizer, limit, end_of_confidence
        )
        return texts, generating.passes

    def _numbers(self, query_id: str, sample: int, count: int) -> Tensor:
        return torch.from_numpy(query_rng(self.seed, sample, query_id, self.name).random(count))


def _agrees(prediction: Prediction, text: str, grading: Grading) -> bool:
    if not prediction.predicted:
        return False
    # Two samples have no likelihoods to rank: they agree if they say the same.
    rule = EXACT if grading.ranks(prediction.answer_type) else grading
    return grade(text, prediction.predicted, prediction.answer_type, grading=rule).correct
