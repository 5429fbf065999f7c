"""One way to answer: a system takes a batch of questions about images, and gives graded answers with their confidences.

Here is a model in this process; `endpoint.system` has the model behind an address.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch, Estimator
from vlm_calibration.estimators.predictions import VERBALIZED, EstimatedPrediction
from vlm_calibration.estimators.probes import Probe, read_probes
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.models.adapters import using_adapter

PROBES = "probes"
"""Name under which the forward passes of all probes are counted."""


class SystemAnswers(NamedTuple):
    """The answers of a system to B queries.

    Attributes:
        predictions: B graded answers, with the estimates of the system's estimators and the probes that were asked for.
        passes: estimator, or `PROBES` -> the forward passes of each query; for an address the generated tokens.
        distributions: for each query confidence -> probability that the system states it, highest confidence first, if
            `ExpectedConfidence` is one of its estimators; empty where it cannot be had.
    """

    predictions: list[EstimatedPrediction]
    passes: dict[str, list[int]]
    distributions: list[Mapping[float, float]]


class System(ABC):
    """Answers questions about images.

    Attributes:
        notes: estimator, or another part of the results, that lacks values -> why.
    """

    notes: Mapping[str, str] = {}

    @abstractmethod
    def answer(self, batch: PromptBatch, probes: Sequence[Probe] = ()) -> SystemAnswers:
        """Answer a batch of at least one query, which has the copies of images that estimators and probes need."""

    def close(self) -> None:  # noqa: B027  (a model in this process has nothing to close)
        """Close connections."""


class LocalSystem(System):
    """A transformers or peft model in this process, in eval mode, with one of its adapters; None: without any.

    The other arguments are as in `AnsweredBatch`, and the estimators that rate its answers.
    """

    def __init__(
        self,
        model: Any,
        adapter: str | None,
        tokenizer: AnswerTokenizer,
        max_new_tokens: int,
        estimators: Sequence[Estimator] = (),
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.estimators = estimators

    @torch.no_grad()
    def answer(self, batch: PromptBatch, probes: Sequence[Probe] = ()) -> SystemAnswers:
        rates = bool(self.estimators or probes)
        with using_adapter(self.model, self.adapter):
            answered = AnsweredBatch.generate(
                self.model, batch, self.tokenizer, self.max_new_tokens, keep_cache=rates
            )
            estimates = {estimator.name: estimator.estimate(answered) for estimator in self.estimators}
            probed, probing = read_probes(answered, probes) if probes else (None, [])
        passes = {name: estimate.passes for name, estimate in estimates.items()}
        if probes:
            passes[PROBES] = probing
        columns = {name: e.confidence for name, e in estimates.items() if name != VERBALIZED}
        predictions = [
            replace(
                answer,
                estimates={name: column[row] for name, column in columns.items()},
                probes=probed[row] if probed else {},
            )
            for row, answer in enumerate(answered.predictions)
        ]
        scored = answered.scored if ExpectedConfidence.name in estimates else [None] * len(predictions)
        return SystemAnswers(predictions, passes, [s.distribution if s else {} for s in scored])
