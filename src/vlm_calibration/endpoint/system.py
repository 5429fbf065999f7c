"""An endpoint as a `System`."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.endpoint.client import Client, Endpoint, RefusedError
from vlm_calibration.endpoint.reading import (
    answer_likelihood,
    complete_statement,
    p_yes,
    percent_distribution,
)
from vlm_calibration.estimators.base import Estimator
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.predictions import VERBALIZED, EstimatedPrediction, graded_prediction
from vlm_calibration.estimators.probes import Probe
from vlm_calibration.estimators.system import System, SystemAnswers
from vlm_calibration.estimators.verbal import ExpectedConfidence, VerbalizedConfidence, rounded
from vlm_calibration.text.confidence import strip_confidence
from vlm_calibration.text.prompts import ElicitationPrompt

EXPECTED, LIKELIHOOD = ExpectedConfidence.name, AnswerLikelihood.name
NOT_SCORED = "an endpoint does not score a given answer, which this estimator needs"
NO_TOKENS = "the server gives no log-probabilities (logprobs)"
NO_CONTINUATION = "the server does not continue a given answer (continue_final_message): no value where a percentage is several tokens"
LISTED = {"logprobs": True, "top_logprobs": 20}
"""Lists as many tokens at each position as OpenAI and vLLM allow by default."""
_Served = tuple[EstimatedPrediction, Mapping[str, int], Mapping[float, float]]
"""The answer to one query, with passes and distribution as in `SystemAnswers`."""


class EndpointSystem(System):
    """Answers questions through an endpoint, as local models do; thread-safe. A DataError as for `Client`.

    The stated confidence is read from the text; the expected confidence and the likelihood of the answer from the tokens that the
    server lists. Other estimators, and all probes, need the scores of texts that we choose, which no server gives.

    Args:
        name: of the system, for messages.
        endpoint: the endpoint.
        estimators: that rate its answers.
        max_new_tokens: length limit of an answer.

    Attributes:
        prompt: how a question is put.
    """

    def __init__(
        self, name: str, endpoint: Endpoint, estimators: Sequence[Estimator], max_new_tokens: int
    ) -> None:
        self.client = Client(endpoint, name)
        self.estimators = [estimator.name for estimator in estimators]
        self.max_new_tokens = max_new_tokens
        self.prompt = ElicitationPrompt()
        given = (VerbalizedConfidence, ExpectedConfidence, AnswerLikelihood)
        self.notes: dict[str, str] = {e.name: NOT_SCORED for e in estimators if type(e) not in given}

    def answer(self, batch: PromptBatch, probes: Sequence[Probe] = ()) -> SystemAnswers:
        """Answer a batch that has its images, several queries at the same time, without probes.

        Raises:
            DataError: a request failed for good; no query is begun after it.
        """
        with ThreadPoolExecutor(self.client.endpoint.concurrency) as threads:
            served = list(threads.map(partial(self._answer, batch), range(len(batch.queries))))
        predictions, generated, distributions = (list(column) for column in zip(*served, strict=True))
        passes = {name: [of_query[name] for of_query in generated] for name in self.estimators}
        return SystemAnswers(predictions, passes, distributions)

    def _answer(self, batch: PromptBatch, row: int) -> _Served:
        query = batch.queries[row]
        content = [
            {"type": "image_url", "image_url": {"url": data_uri(batch.images[row])}},
            {"type": "text", "text": self.prompt.render(query.question)},
        ]
        messages = [{"role": "user", "content": content}]
        reads_tokens = EXPECTED in self.estimators or LIKELIHOOD in self.estimators
        response = self.client.ask(messages, self.max_new_tokens, **(LISTED if reads_tokens else {}))
        if reads_tokens and not response.tokens:
            self.notes |= {name: NO_TOKENS for name in (EXPECTED, LIKELIHOOD) if name in self.estimators}
        text = complete_statement(response.text)
        prediction = graded_prediction(
            query, text, batch.perturbations[row], batch.noise_steps[row], batch.grading
        )
        generated = dict.fromkeys(self.estimators, 0) | {VERBALIZED: response.generated}
        estimates: dict[str, float | None] = dict.fromkeys(n for n in self.estimators if n != VERBALIZED)
        distribution: dict[float, float] = {}
        if LIKELIHOOD in self.estimators:
            estimates[LIKELIHOOD] = answer_likelihood(response.tokens, strip_confidence(prediction.text))
            if query.answer_type == "yes_no":
                p = p_yes(response.tokens) if prediction.predicted in ("yes", "no") else None
                estimates[LIKELIHOOD] = 1 - p if p is not None and prediction.predicted == "no" else p
        if EXPECTED in self.estimators:

            def after(beginning: str) -> Mapping[bytes, float] | None:
                listed = self._continue(messages, beginning)
                generated[EXPECTED] += listed is not None
                return listed

            distribution = percent_distribution(response.tokens, after)
            if distribution:
                mean = sum(level * p for level, p in distribution.items())
                estimates[EXPECTED] = min(max(mean, 0.0), 1.0)
        estimates = {name: None if value is None else rounded(value) for name, value in estimates.items()}
        return replace(prediction, estimates=estimates), generated, distribution

    def _continue(
        self, messages: Sequence[Mapping[str, Any]], beginning: str
    ) -> Mapping[bytes, float] | None:
        """The listed tokens after the beginning of an answer, as vLLM and SGLang give them; None: the server cannot."""
        if self.notes.get(EXPECTED) == NO_CONTINUATION:
            return None
        messages = [*messages, {"role": "assistant", "content": beginning.lstrip()}]
        continuing = {"continue_final_message": True, "add_generation_prompt": False}
        try:
            response = self.client.ask(messages, 1, **LISTED, **continuing)
        except RefusedError:
            self.notes[EXPECTED] = NO_CONTINUATION
            return None
        return response.tokens[0].alternatives if response.tokens else {}

    def close(self) -> None:
        self.client.close()


def data_uri(image: np.ndarray) -> str:
    """Encode an image, uint8 [H, W, 3], as a PNG in a data URI; the same image always gives the same text."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
