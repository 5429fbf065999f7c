"""Batches of questions with a model's answers, or with answers written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vlm_calibration.data.collate import ChatFormat, PromptBatch, PromptCollator
from vlm_calibration.data.noise import ImageCopy, NoisePolicy, Sample, perturbed_copies
from vlm_calibration.demo.scenes import render_scene
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch, grade_answers
from vlm_calibration.perturbation.levels import CLEAN, AnchoredLevels, ConfidenceLevels, LinearLevels
from vlm_calibration.records import LoadedImage, Query
from vlm_calibration.text.confidence import ElicitationPrompt

from ..level_tables import noise_counts
from ..models.families import FOUR
from ..models.processors import SIZES, cached_family

Answering = Callable[..., AnsweredBatch]
ASKED = (
    ("A dog?", "Yes", "yes_no", "Yes. Confidence: 80%"),
    ("What is at the very top left?", "umbrella", "short", "a blue umbrella"),
    ("Do you see a cup?", "Yes", "yes_no", "Confidence: 10%. No"),
    ("Is it late?", "No", "yes_no", "It is white."),
)
"""Question, gold answer, its type, and the answer that is rated."""
UNANSWERED = ("Is there a cat?", "No", "yes_no", "Confidence: 10%")
ROWS = (*ASKED, UNANSWERED)
LEVELS = AnchoredLevels.fit(
    dict.fromkeys(("yes_no", "short"), noise_counts((0, 100, 90), (0.5, 100, 60), (1, 100, 30)))
)
"""90%, 60% and 30%: two digits each, so that no level is likelier for being shorter."""


@pytest.fixture(scope="module", params=FOUR)
def asked(request: pytest.FixtureRequest) -> tuple[Any, ChatFormat, list[Sample]]:
    """A model of a family with random weights, its chat, and the questions `ROWS` about random images."""
    family, rng = cached_family(request.param), np.random.default_rng(0)
    torch.manual_seed(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in (*SIZES, SIZES[0])]
    return family.model().eval(), ChatFormat(family.processor, ElicitationPrompt()), samples_of(images)


@pytest.fixture
def demo(load_model: Any, processor: Any) -> tuple[Any, ChatFormat]:
    return load_model(), ChatFormat(processor, ElicitationPrompt())


def samples_of(images: Sequence[np.ndarray], rows: Sequence[tuple[str, ...]] | None = None) -> list[Sample]:
    return [
        Sample(Query(f"q{i}", f"{i}.png", q, a, kind), image, 0.5, CLEAN, 0)  # type: ignore[arg-type]
        for i, ((q, a, kind, _), image) in enumerate(zip(rows or ROWS, images, strict=False))
    ]


def scenes(n: int) -> list[np.ndarray]:
    return [np.asarray(render_scene(i).image) for i in range(n)]


def logits(confidence: Sequence[float | None]) -> list[float]:
    """Log-odds, which resolve confidences near 0 and 1."""
    return [math.log(c / (1 - c)) for c in confidence if c is not None]


def with_copies(
    samples: Sequence[Sample], copies: Sequence[ImageCopy], chat: ChatFormat, regions_of: Any = None
) -> list[Sample]:
    """Samples with copies of their images; `regions_of` gives evidence and distractors for row and image."""
    result = []
    for row, sample in enumerate(samples):
        evidence, distractors = regions_of(row, sample.image) if regions_of else ((), ())
        loaded = LoadedImage(sample.image, tuple(evidence), tuple(distractors))
        made = perturbed_copies(sample, loaded, copies, NoisePolicy(), chat.processor.image_processor)
        result.append(sample._replace(copies=made))
    return result


@pytest.fixture(scope="session")
def answering() -> Answering:
    """Builds a batch with the given texts as answers, by default the model's own; `keep_cache` keeps generation's cache."""

    def answered(
        model: Any,
        chat: ChatFormat,
        samples: Sequence[Sample],
        texts: Sequence[str] | None = None,
        levels: ConfidenceLevels | None = None,
        keep_cache: bool = False,
        max_new_tokens: int = 3,
    ) -> AnsweredBatch:
        batch: PromptBatch = PromptCollator(chat)(samples)
        tokenizer = AnswerTokenizer(chat, levels or LinearLevels())
        answered = AnsweredBatch.generate(model, batch, tokenizer, max_new_tokens, keep_cache)
        return replace(answered, predictions=grade_answers(batch, texts)) if texts else answered

    return answered
