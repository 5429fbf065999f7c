"""Asking questions about images: the same for a model in this process and for one behind an address."""

import io
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps

from vlm_calibration.data.collate import PromptBatch, PromptCollator
from vlm_calibration.data.noise import NoisePolicy, Sample, perturb_query
from vlm_calibration.data.resolution import resize_to_model
from vlm_calibration.demo.questions import unknown_part
from vlm_calibration.endpoint.client import Endpoint
from vlm_calibration.endpoint.system import EndpointSystem
from vlm_calibration.estimators.base import System
from vlm_calibration.estimators.decision import AppliedRule, Decision, DecisionRule
from vlm_calibration.estimators.predictions import EXPECTED
from vlm_calibration.estimators.verbal import ExpectedConfidence, rounded
from vlm_calibration.metrics.risk_control import percent
from vlm_calibration.models.forward import shared_vision
from vlm_calibration.perturbation.images import DEFAULT_MAX_PIXELS, ImageError, load_image
from vlm_calibration.perturbation.levels import CLEAN, Perturbation
from vlm_calibration.perturbation.noise import ImageArray, check_image
from vlm_calibration.records import VERBALIZED, AnswerType, DataError, LoadedImage, Prediction, Query
from vlm_calibration.text.confidence import strip_confidence

BASE, CALIBRATED, ENDPOINT = "base", "calibrated", "endpoint"
ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""A path, the bytes of a file, a Pillow image, or uint8 [H, W, 3]."""


@dataclass(frozen=True)
class Answer:
    """An answer with its confidence.

    Attributes:
        text: the output as generated.
        answer: the output without the statement of confidence.
        confidence: the stated confidence in [0, 1]; None if it could not be parsed.
        expected: mean of the confidences that the model might have stated after its answer, in [0, 1]; None without an answer.
        distribution: confidence -> probability that the model states it, highest confidence first; sums to 1.
        answer_type: the kind of question that the model was asked.
        rule: the threshold that the confidence was compared with, and its guarantee; None if the model has none for this question.
        warning: what the demo's model does not know in the question, so that answer and confidence mean nothing; None for other models.
    """

    text: str
    answer: str
    confidence: float | None
    expected: float | None
    distribution: Mapping[float, float] = field(hash=False, repr=False)
    answer_type: AnswerType
    rule: AppliedRule | None = None
    warning: str | None = None

    @property
    def decision(self) -> Decision | None:
        """Whether the answer may be given, or goes to a person for review; None without a rule."""
        return None if self.rule is None else self.rule.decision

    @property
    def reason(self) -> str:
        """Why `decision` is what it is, as a clause; empty without a rule."""
        if (rule := self.rule) is None:
            return ""
        if rule.unfamiliar is not None:
            return rule.unfamiliar
        name = "stated" if rule.estimator == VERBALIZED else rule.estimator
        if rule.confidence is None:
            return f"no {name} confidence"
        if rule.threshold is None:
            return "no threshold keeps the limits"
        relation = "at least" if rule.decision == "answer" else "below"
        return f"{name} {percent(rule.confidence)}, {relation} {percent(rule.threshold)}"

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain values; the distribution as pairs of confidence and probability, without those below 0.1%."""
        return {
            "text": self.text,
            "answer": self.answer,
            "confidence": self.confidence,
            "expected": self.expected,
            "distribution": [[level, round(p, 6)] for level, p in self.distribution.items() if p >= 1e-3],
            "answer_type": self.answer_type,
            "warning": self.warning,
            "decision": self.decision,
            "threshold": None if self.rule is None else self.rule.threshold,
            "unfamiliar": None if self.rule is None else self.rule.unfamiliar,
        }


@dataclass(frozen=True, eq=False, repr=False)
class CalibratedModel:
    """Answers questions about images with a model in this process or behind an address; thread-safe, one batch at a time.

    Attributes:
        name: for messages.
        systems: "base", and "calibrated" if there is an adapter; or "endpoint". They rate their answers by `ExpectedConfidence`.
        collate: makes the batch that the systems answer.
        noise: how `sample` perturbs images.
        device: where models run that work beside it.
        model: the transformers or peft model; None behind an address.
        image_processor: defines the size at which the model sees an image; None: it is not known.
        is_demo: whether the base model is the demo's.
        rule: decides about the answers of the last system; None: nothing does.
    """

    name: str
    systems: Mapping[str, System]
    collate: Callable[[Sequence[Sample]], PromptBatch]
    noise: NoisePolicy
    device: torch.device
    model: Any = None
    image_processor: Any = None
    is_demo: bool = False
    rule: DecisionRule | None = None
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock, init=False)

    def answers(self, samples: Sequence[Sample], systems: Iterable[str] = ()) -> dict[str, list[Answer]]:
        """Answer one batch of samples from `sample` with some systems, or else all; returns system -> its answers."""
        answers = {}
        with self._one_at_a_time, nullcontext() if self.model is None else shared_vision(self.model):
            batch = self.collate(samples)
            for name in systems or self.systems:
                predictions, _, distributions = self.systems[name].answer(batch)
                answers[name] = [
                    Answer(
                        text=p.text,
                        answer=strip_confidence(p.text),
                        confidence=p.confidence,
                        expected=p.estimates[EXPECTED],
                        distribution=distribution,
                        answer_type=p.answer_type,
                        rule=self._applied_rule(p) if name == self.main else None,
                        warning=self.unknown_part(p.question),
                    )
                    for p, distribution in zip(predictions, distributions, strict=True)
                ]
        return answers

    def _applied_rule(self, prediction: Prediction) -> AppliedRule | None:
        if self.rule is None:
            return None
        confidence = prediction.confidence_of(self.rule.estimator)
        if self.rule.estimator != VERBALIZED:
            confidence = rounded(confidence)  # as an evaluation measures it
        question = prediction.question
        unfamiliar = self.unknown_part(question) or self.rule.questions.unfamiliar(question)
        return self.rule.applied(confidence, prediction.category, unfamiliar)

    @property
    def main(self) -> str:
        """The last system, whose answers count."""
        return list(self.systems)[-1]

    def unknown_part(self, question: str) -> str | None:
        """What the demo model does not know in a question; None if it knows it, and for any other model."""
        return unknown_part(question) if self.is_demo else None

    def close(self) -> None:
        """Close connections."""
        for system in self.systems.values():
            system.close()

    def seen(self, sample: Sample) -> np.ndarray:
        """The sample's image at the model's input resolution if that is known, uint8 [H, W, 3]."""
        if self.image_processor is None:
            return sample.image
        return resize_to_model(self.image_processor, sample.image)

    def ask(
        self,
        image: ImageLike,
        question: str,
        answer_type: AnswerType | None = None,
        category: str | None = None,
        *,
        as_base: bool = False,
    ) -> Answer:
        """Ask one question; raises a DataError if it or its image cannot be used.

        Args:
            image: a path, the bytes of a file, a Pillow image, or uint8 [H, W, 3].
            answer_type: "yes_no", "short" or "open"; None: recognised from the question.
            category: of the question, for thresholds by category; without it they decide nothing.
            as_base: answer without the adapter.
        """
        return next(self.ask_many([(image, question, answer_type, category)], as_base=as_base))

    def ask_many(
        self, questions: Iterable[tuple[Any, ...]], batch_size: int = 8, *, as_base: bool = False
    ) -> Iterator[Answer]:
        """Ask many questions as by `ask`; yields their answers in the same order.

        Args:
            questions: image, question and optionally answer type and category, as for `ask`; consumed one batch at a time.
            batch_size: questions answered together, at least 1; the answers do not depend on it.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        system = BASE if as_base else self.main
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
        """Prepare a question, `name` in messages, as for `ask`.

        The perturbation, seeded by the name, acts on the region `mask`, bool [H, W]; None: the image stays untouched.
        """
        if not question.strip():
            raise DataError(f"{name}: the question is empty")
        # The gold answer is unknown; nothing is graded.
        query = Query(name, "", question, "-", answer_type or answer_type_of(question), category=category)
        loaded = LoadedImage(pixels_of(image), () if mask is None else (mask,), ())
        noise = self.noise if mask is not None else replace(self.noise, absent="clean")
        return perturb_query(query, loaded, noise, self.image_processor, epoch=0, perturbation=perturbation)


def served_model(endpoint: Endpoint, max_new_tokens: int) -> CalibratedModel:
    """A model behind an address, as for `EndpointSystem`. Images are sent as they are, and perturbed at native resolution."""
    return CalibratedModel(
        f"{endpoint.model} at {endpoint.url}",
        {ENDPOINT: EndpointSystem(ENDPOINT, endpoint, [ExpectedConfidence()], max_new_tokens)},
        PromptCollator(None, grading=None, keep_images=True),
        NoisePolicy(resolution="native"),
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


def answer_type_of(question: str) -> AnswerType:
    """The kind of answer that an English question asks for: yes/no if it begins with a verb and has no "or".

    >>> answer_type_of("Is there a dog?"), answer_type_of("Is it a dog or a cat?"), answer_type_of("What is it?")
    ('yes_no', 'short', 'short')
    """
    verbs = "is|are|was|were|am|do|does|did|can|could|has|have|had|will|would|should|must|may|might"
    begins = re.match(rf"\W*(?:{verbs})(?:n't)?\b", question, re.IGNORECASE)
    return "yes_no" if begins and not re.search(r"\bor\b", question, re.IGNORECASE) else "short"


def pixels_of(image: ImageLike, max_pixels: int = DEFAULT_MAX_PIXELS, name: str | None = None) -> ImageArray:
    """Convert an image, `name` in messages, to uint8 [H, W, 3], by the rules of `load_image`.

    A DataError if it cannot be used; a TypeError or ValueError for an array of another form.
    """
    if isinstance(image, np.ndarray):
        check_image(image)
        return image
    try:
        if isinstance(image, Image.Image):
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height} pixels"
                raise ImageError(f"image: {size}, more than the {max_pixels} allowed")
            if image.mode in ("F", "LAB"):
                problem = f"{image.mode} pixels have no unique conversion to 8-bit RGB"
                raise ImageError(f"image: {problem}; convert it to RGB")
            # Encoded as a file, it is read like any other, whatever its mode and transparency.
            upright, file = ImageOps.exif_transpose(image), io.BytesIO()
            if upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
                upright = upright.convert("RGB")
            upright.save(file, "PNG", compress_level=1)
            image, name = file.getvalue(), name or "image"
        return load_image(image, max_pixels=max_pixels, name=name)
    except (ImageError, OSError) as error:
        raise DataError(str(error)) from error
