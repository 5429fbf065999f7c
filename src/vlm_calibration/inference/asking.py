"""Asking questions about images: what is the same for a model in this process and for one behind an address."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from vlm_calibration.data.noise import NoisePolicy, Sample, perturb_query
from vlm_calibration.estimators.decision import DecisionRule
from vlm_calibration.inference.answers import Answer
from vlm_calibration.inference.pixels import ImageLike, pixels_of
from vlm_calibration.perturbation.levels import CLEAN, Perturbation
from vlm_calibration.records import AnswerType, DataError, LoadedImage, Query

BASE, CALIBRATED, ENDPOINT = "base", "calibrated", "endpoint"


class Asker(ABC):
    """Answers questions about images.

    Attributes:
        name: name for messages.
        systems: "base", and "calibrated" if there is an adapter; or "endpoint".
        rule: decides about the answers of the last system; None: nothing does.
        is_demo: whether the base model is the demo's, of which it is known what it knows.
        noise: how `sample` perturbs images.
        device: where models run that work beside it.
        image_processor: defines the size at which the model sees an image; None: not known, so `noise` is at native resolution.
    """

    name: str
    systems: tuple[str, ...]
    rule: DecisionRule | None = None
    is_demo: bool = False
    noise: NoisePolicy
    image_processor: Any = None
    device: torch.device

    @abstractmethod
    def answers(self, samples: Sequence[Sample], systems: Sequence[str]) -> dict[str, list[Answer]]:
        """Answer one batch of samples with each of some systems.

        Args:
            samples: what `sample` returns.
            systems: names in `self.systems`.

        Returns:
            System -> its answers, in the order of the samples.
        """

    def unknown_part(self, question: str) -> str | None:
        """What the model does not know in a question, if that is known; None if it knows it."""
        return None

    def close(self) -> None:  # noqa: B027  (a model in this process has nothing to close)
        """Close connections and files."""

    def seen(self, sample: Sample) -> np.ndarray:
        """The sample's image as the model is given it, uint8 [H, W, 3]."""
        return sample.image

    def ask(
        self,
        image: ImageLike,
        question: str,
        answer_type: AnswerType | None = None,
        category: str | None = None,
        *,
        as_base: bool = False,
    ) -> Answer:
        """Ask one question.

        Args:
            image: a path, the bytes of a file, a Pillow image, or uint8 [H, W, 3].
            question: the question about the image.
            answer_type: "yes_no", "short" or "open"; None: recognised from the question.
            category: of the question, for thresholds by category; without it they decide nothing.
            as_base: answer without the adapter.

        Raises:
            DataError: the image or the question cannot be used.
        """
        return next(self.ask_many([(image, question, answer_type, category)], as_base=as_base))

    def ask_many(
        self,
        questions: Iterable[
            tuple[ImageLike, str]
            | tuple[ImageLike, str, AnswerType | None]
            | tuple[ImageLike, str, AnswerType | None, str | None]
        ],
        batch_size: int = 8,
        *,
        as_base: bool = False,
    ) -> Iterator[Answer]:
        """Ask many questions; yields their answers in the same order.

        Args:
            questions: image, question and optionally answer type and category, as for `ask`; consumed one batch at a time.
            batch_size: questions answered together; the answers do not depend on it.
            as_base: answer without the adapter.

        Raises:
            DataError: an image or a question cannot be used.
            ValueError: `batch_size` below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        system = BASE if as_base else self.systems[-1]
        pending = iter(enumerate(questions, start=1))
        while batch := list(islice(pending, batch_size)):
            samples = [self.sample(*question, name=f"question {number}") for number, question in batch]
            yield from self.answers(samples, [system])[system]

    def sample(
        self,
        image: ImageLike,
        question: str,
        answer_type: AnswerType | None = None,
        category: str | None = None,
        *,
        name: str = "question",
        mask: Any = None,
        perturbation: Perturbation = CLEAN,
    ) -> Sample:
        """Prepare a question about an image for the model.

        Args:
            image: as for `ask`.
            question: as for `ask`.
            answer_type: as for `ask`.
            category: as for `ask`.
            name: name of the question in messages, and seed of the perturbation.
            mask: region to perturb, bool [H, W]; None: the whole image stays untouched.
            perturbation: what happens to the region.

        Raises:
            DataError: the image or the question cannot be used.
        """
        if not question.strip():
            raise DataError(f"{name}: the question is empty")
        # The gold answer is unknown; nothing is graded.
        kind = answer_type or answer_type_of(question)
        query = Query(name, "", question, "-", kind, category=category)
        loaded = LoadedImage(pixels_of(image), () if mask is None else (mask,), ())
        noise = self.noise if mask is not None else replace(self.noise, absent="clean")
        return perturb_query(query, loaded, noise, self.image_processor, epoch=0, perturbation=perturbation)


_BEGINS_YES_NO = re.compile(
    r"\W*(?:is|are|was|were|am|do|does|did|can|could|has|have|had|will|would|should|must|may|might)(?:n't)?\b",
    re.IGNORECASE,
)


def answer_type_of(question: str) -> AnswerType:
    """The kind of answer that an English question asks for: yes/no if it begins with a verb and has no "or".

    >>> answer_type_of("Is there a dog?"), answer_type_of("Is it a dog or a cat?"), answer_type_of("What is it?")
    ('yes_no', 'short', 'short')
    """
    begins = _BEGINS_YES_NO.match(question) is not None
    return "yes_no" if begins and not re.search(r"\bor\b", question, re.IGNORECASE) else "short"
