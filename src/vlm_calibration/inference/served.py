"""A model behind an OpenAI-compatible address as an object that answers questions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlm_calibration.data.collate import PromptCollator
from vlm_calibration.data.noise import NoisePolicy, Sample
from vlm_calibration.endpoint.settings import Endpoint
from vlm_calibration.endpoint.system import EXPECTED, EndpointSystem
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.inference.answers import Answer
from vlm_calibration.inference.asking import ENDPOINT, Asker
from vlm_calibration.text.confidence import strip_confidence


class ServedModel(Asker):
    """Answers questions through an endpoint; thread-safe. Images are sent as they are.

    The distribution over confidences is that of `percent_distribution`, empty where the server gives no log-probabilities.

    Args:
        endpoint: the endpoint.
        max_new_tokens: length limit of an answer.
    """

    def __init__(self, endpoint: Endpoint, max_new_tokens: int) -> None:
        self.name = f"{endpoint.model} at {endpoint.url}"
        self.systems = (ENDPOINT,)
        self.noise = NoisePolicy(resolution="native")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._system = EndpointSystem(
            ENDPOINT, endpoint, [ExpectedConfidence()], max_new_tokens, grades=False
        )

    def close(self) -> None:
        self._system.close()

    def answers(self, samples: Sequence[Sample], systems: Sequence[str]) -> dict[str, list[Answer]]:
        served = self._system.answer(PromptCollator(None, keep_images=True)(samples))
        answers = [
            Answer(
                text=prediction.text,
                answer=strip_confidence(prediction.text),
                confidence=prediction.confidence,
                expected=prediction.estimates[EXPECTED],
                distribution=distribution,
                answer_type=prediction.answer_type,
            )
            for prediction, _, distribution in served
        ]
        return dict.fromkeys(systems, answers)
