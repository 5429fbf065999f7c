"""A model behind an OpenAI-compatible address as an object that answers questions."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from vlm_calibration.data.collate import ImageCollator
from vlm_calibration.data.noise import NoisePolicy, Sample
from vlm_calibration.endpoint.responses import ResponseLog
from vlm_calibration.endpoint.settings import Endpoint
from vlm_calibration.endpoint.system import EndpointSystem, RatedAnswer
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.inference.answers import Answer
from vlm_calibration.inference.asking import ENDPOINT, Asker
from vlm_calibration.text.prompts import ElicitationPrompt


class ServedModel(Asker):
    """Answers questions through an endpoint. It is thread-safe: one batch is answered at a time.

    Images are sent as they are. The distribution over confidences is that of `EndpointEstimates.distribution`, empty where the server
    gives no log-probabilities.

    Args:
        endpoint: the endpoint.
        max_new_tokens: length limit of an answer.
        responses: file in which responses are kept until it is removed; a response that it has is not asked for again.

    Raises:
        DataError: the server cannot be reached, or refuses to answer.
    """

    def __init__(self, endpoint: Endpoint, max_new_tokens: int, responses: Path | None = None) -> None:
        self.name = f"{endpoint.model} at {endpoint.url}"
        self.systems = (ENDPOINT,)
        self.noise = NoisePolicy(resolution="native")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._system = EndpointSystem(
            ENDPOINT, endpoint, [ExpectedConfidence()], max_new_tokens, grades=False
        )
        if responses is not None:
            self._system.client.log = ResponseLog(responses)
        self._system.connect(ElicitationPrompt())
        self._one_at_a_time = threading.Lock()

    def close(self) -> None:
        self._system.close()

    @property
    def expected_note(self) -> str | None:
        """Why the expected confidence cannot be had, or not always; None if it can."""
        return self._system.notes.get(ExpectedConfidence.name)

    def answers(self, samples: Sequence[Sample], systems: Sequence[str]) -> dict[str, list[Answer]]:
        with self._one_at_a_time:
            rated = self._system.answer(ImageCollator()(samples))
            distributions = self._system.client.run([self._distribution(answer) for answer in rated])
        answers = [_answer(answer, d) for answer, d in zip(rated, distributions, strict=True)]
        return dict.fromkeys(systems, answers)

    async def _distribution(self, answer: RatedAnswer) -> dict[float, float]:
        """The responses that it is read from are those of the expected confidence; nothing is asked again."""
        distribution, _ = await self._system.estimates.distribution(answer.asked)
        return distribution


def _answer(answer: RatedAnswer, distribution: dict[float, float]) -> Answer:
    return Answer(
        text=answer.prediction.text,
        answer=answer.asked.answer,
        confidence=answer.prediction.confidence,
        expected=answer.ratings[ExpectedConfidence.name].confidence,
        distribution=distribution,
        answer_type=answer.prediction.answer_type,
    )
