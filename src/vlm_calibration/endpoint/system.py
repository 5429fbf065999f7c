"""An endpoint as a system of an evaluation: it answers a batch of questions about images, and rates its answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.endpoint.client import Client, greedy, listing_tokens
from vlm_calibration.endpoint.estimates import READ_TOKENS, Asked, EndpointEstimates, Rating
from vlm_calibration.endpoint.reading import complete_statement
from vlm_calibration.endpoint.settings import Endpoint
from vlm_calibration.estimators.base import Estimator
from vlm_calibration.estimators.predictions import EstimatedPrediction, graded_prediction
from vlm_calibration.text.prompts import ElicitationPrompt


class RatedAnswer(NamedTuple):
    """The answer to one query.

    Attributes:
        asked: the graded answer, with its response.
        ratings: estimator -> its rating.
    """

    asked: Asked
    ratings: Mapping[str, Rating]

    @property
    def prediction(self) -> EstimatedPrediction:
        """The graded answer, without ratings."""
        return self.asked.prediction


class EndpointSystem:
    """Answers questions through an endpoint. Prompt, image, limit of length and grading are those of local models.

    Args:
        name: of the system.
        endpoint: the endpoint.
        estimators: that rate its answers.
        max_new_tokens: length limit of an answer.
        grades: whether gold answers are known; otherwise no answer counts as correct.

    Raises:
        DataError: see `Client`.
    """

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        estimators: Sequence[Estimator],
        max_new_tokens: int,
        grades: bool = True,
    ) -> None:
        self.client = Client(endpoint, name)
        self.estimators = estimators
        self.max_new_tokens = max_new_tokens
        self.grades = grades

    def connect(self, prompt: ElicitationPrompt) -> None:
        """Reach the server before anything else is done; see `Client.connect`.

        Args:
            prompt: how a question is put.

        Raises:
            DataError: the server cannot be reached, or refuses to answer.
        """
        self.prompt = prompt
        self._reads_tokens = any(isinstance(e, READ_TOKENS) for e in self.estimators)
        self.client.connect(with_tokens=self._reads_tokens)
        self.estimates = EndpointEstimates(self.client, self.estimators)

    @property
    def notes(self) -> Mapping[str, str]:
        """Name of an estimator that cannot be had -> why."""
        return self.estimates.notes

    def answer(self, batch: PromptBatch) -> list[RatedAnswer]:
        """Answer a batch that has its images, all queries at the same time.

        Raises:
            DataError: a request failed for good.
        """
        return self.client.run([self._answer(batch, row) for row in range(len(batch.queries))])

    async def _answer(self, batch: PromptBatch, row: int) -> RatedAnswer:
        query = batch.queries[row]
        image = {"type": "image_url", "image_url": {"url": data_uri(batch.images[row])}}
        content: list[Mapping[str, Any]] = [
            image,
            {"type": "text", "text": self.prompt.render(query.question)},
        ]
        body = greedy(content, self.max_new_tokens)
        response = await self.client.ask(listing_tokens(body) if self.client.gives_tokens else body)
        prediction = graded_prediction(
            query,
            complete_statement(response.text),
            batch.perturbations[row],
            batch.noise_steps[row],
            batch.grading if self.grades else None,
        )
        asked = Asked(query, prediction, response, content, image, self.max_new_tokens, batch.grading)
        return RatedAnswer(asked, await self.estimates.rate(asked))

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def data_uri(image: np.ndarray) -> str:
    """An image, uint8 [H, W, 3], as a PNG in a data URI; the same image always gives the same text."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
