"""An endpoint as a `System`."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from PIL import Image

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.endpoint.client import Client, Endpoint, RefusedError, Response, Token
from vlm_calibration.endpoint.reading import (
    answer_likelihood,
    complete_statement,
    p_yes,
    percent_distribution,
)
from vlm_calibration.estimators.base import Estimate, Estimator, System, SystemAnswers, grade_answers
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.predictions import EXPECTED, VERBALIZED, EstimatedPrediction
from vlm_calibration.estimators.probes import Probe
from vlm_calibration.estimators.verbal import rounded
from vlm_calibration.text.confidence import strip_confidence
from vlm_calibration.text.prompts import ElicitationPrompt

LIKELIHOOD = AnswerLikelihood.name
NO_CONTINUATION = "the server does not continue a given answer (continue_final_message): no value where a percentage is several tokens"
LISTED = {"logprobs": True, "top_logprobs": 20}
"""Lists as many tokens at each position as OpenAI and vLLM allow by default."""


class EndpointSystem(System):
    """Answers questions through an endpoint, as local models do; thread-safe. A DataError as for `Client`.

    The stated confidence is read from the text; the expected confidence and the likelihood of the answer from the tokens that the
    server lists. Other estimators, and all probes, need the scores of texts that we choose, which no server gives.
    """

    def __init__(
        self, name: str, endpoint: Endpoint, estimators: Sequence[Estimator], max_new_tokens: int
    ) -> None:
        self.client = Client(endpoint, name)
        self.estimators = [estimator.name for estimator in estimators]
        self.of_tokens = [e for e in self.estimators if e in (EXPECTED, LIKELIHOOD)]
        self.max_new_tokens = max_new_tokens
        self.prompt = ElicitationPrompt()
        others = [name for name in self.estimators if name not in (VERBALIZED, EXPECTED, LIKELIHOOD)]
        not_scored = "an endpoint does not score a given answer, which this estimator needs"
        self.notes: dict[str, str] = dict.fromkeys(others, not_scored)

    def answer(self, batch: PromptBatch, probes: Sequence[Probe] = ()) -> SystemAnswers:
        """Answer a batch that has its images, several queries at once, without probes; a DataError if a request failed for good."""
        n = len(batch.queries)
        with ThreadPoolExecutor(self.client.endpoint.concurrency) as threads:
            asked = list(threads.map(partial(self._ask, batch), range(n)))
        responses, distributions, continued = (list(column) for column in zip(*asked, strict=True))
        if not all(response.tokens for response in responses):
            self.notes |= dict.fromkeys(self.of_tokens, "the server gives no log-probabilities (logprobs)")
        answers = grade_answers(batch, [complete_statement(response.text) for response in responses])
        likelihoods = [_likelihood(a, r.tokens) for a, r in zip(answers, responses, strict=True)]
        means = [sum(level * p for level, p in d.items()) if d else None for d in distributions]
        known = {
            VERBALIZED: Estimate([a.confidence for a in answers], [r.generated for r in responses]),
            # Rounding can move a mean just above 1.
            EXPECTED: Estimate([rounded(None if m is None else min(m, 1.0)) for m in means], continued),
            LIKELIHOOD: Estimate([rounded(likelihood) for likelihood in likelihoods], [0] * n),
        }
        estimates = {name: known.get(name, Estimate([None] * n, [0] * n)) for name in self.estimators}
        return SystemAnswers.of(answers, estimates, distributions)

    def _ask(self, batch: PromptBatch, row: int) -> tuple[Response, dict[float, float], int]:
        """The response to one query, its `percent_distribution` if that is asked for, and how many tokens were generated for it."""
        file = io.BytesIO()
        Image.fromarray(batch.images[row]).save(file, "PNG", compress_level=1)
        image = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": self.prompt.render(batch.queries[row].question)},
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        response = self.client.ask(messages, self.max_new_tokens, **(LISTED if self.of_tokens else {}))
        if EXPECTED not in self.estimators:
            return response, {}, 0
        continued = 0

        def after(beginning: str) -> Mapping[bytes, float] | None:
            """The listed tokens after the beginning of an answer, as vLLM and SGLang give them; None: the server cannot."""
            nonlocal continued
            if self.notes.get(EXPECTED) == NO_CONTINUATION:
                return None
            begun = [*messages, {"role": "assistant", "content": beginning.lstrip()}]
            continuing = {"continue_final_message": True, "add_generation_prompt": False}
            try:
                tokens = self.client.ask(begun, 1, **LISTED, **continuing).tokens
            except RefusedError:
                self.notes[EXPECTED] = NO_CONTINUATION
                return None
            continued += 1
            return tokens[0].alternatives if tokens else {}

        return response, percent_distribution(response.tokens, after), continued

    def close(self) -> None:
        self.client.close()


def _likelihood(answer: EstimatedPrediction, tokens: Sequence[Token]) -> float | None:
    """The likelihood of an answer as in `AnswerLikelihood`, from its listed tokens; None if they do not give it."""
    if answer.answer_type != "yes_no":
        return answer_likelihood(tokens, strip_confidence(answer.text))
    p = p_yes(tokens)
    if p is None or answer.predicted not in ("yes", "no"):
        return None
    return p if answer.predicted == "yes" else 1 - p
