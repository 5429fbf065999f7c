"""Batches for the tiny model, with rows of different lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlm_calibration.data.collate import ChatFormat, PromptBatch, PromptCollator, SFTBatch, SFTCollator
from vlm_calibration.data.noise import Sample
from vlm_calibration.demo.scenes import render_scene
from vlm_calibration.perturbation.levels import CLEAN
from vlm_calibration.records import Query
from vlm_calibration.text.confidence import ElicitationPrompt


@pytest.fixture(scope="session")
def questions() -> list[Sample]:
    rows = (
        ("A dog?", "Yes", 0.9),
        ("Is there a very large elephant at the top left?", "umbrella", 0.35),
        ("Do you see a cup?", "No", 0.0),
    )
    return [
        Sample(Query(f"q{i}", "x", q, a, "short"), np.asarray(render_scene(i).image), c, CLEAN, 0)
        for i, (q, a, c) in enumerate(rows)
    ]


@pytest.fixture(scope="session")
def batch(processor: Any, questions: list[Sample]) -> SFTBatch:
    return SFTCollator(ChatFormat(processor, ElicitationPrompt()), 500)(questions)


@pytest.fixture(scope="session")
def prompts(processor: Any, questions: list[Sample]) -> PromptBatch:
    return PromptCollator(ChatFormat(processor, ElicitationPrompt()))(questions)
