"""The card's program gives every family of models the same tokens and pixels as this package, and gets the same reply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_calibration.data.collate import ChatFormat, PromptCollator
from vlm_calibration.data.noise import Sample
from vlm_calibration.models.generation import generate
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.perturbation.levels import CLEAN
from vlm_calibration.records import Query
from vlm_calibration.reporting.card import EXAMPLE, Card, card_text
from vlm_calibration.text.prompts import ElicitationPrompt

from ..models.families import FOUR
from ..models.processors import cached_family

pytestmark = pytest.mark.slow

PROMPT = ElicitationPrompt()


@pytest.mark.parametrize("family", [*FOUR, "paligemma2"])
def test_the_program_asks_as_we_do(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = cached_family(family).processor
    folder = cached_family(family).save(tmp_path / "model")
    settings = tmp_path / "model/generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "repetition_penalty": 1.9}))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    has_template = getattr(processor, "chat_template", None) is not None
    assert has_template == (family != "paligemma2")
    card = Card(
        "org/base",
        location=folder,
        merged=True,
        template=PROMPT.template,
        has_chat_template=has_template,
        max_new_tokens=6,
    )
    scope: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(card_text(card).split("```python\n")[1].split("```")[0], scope)
    sample = Sample(Query("q", "x", EXAMPLE, "Yes", "yes_no"), pixels, 1.0, CLEAN, 0)
    batch = PromptCollator(ChatFormat(processor, PROMPT))([sample])
    for name, tensor in batch.inputs.items():
        assert (scope["inputs"][name] == tensor).all(), name
    model = load_base(BaseModel(folder))
    assert generate(model, batch.inputs, processor.tokenizer, 6).texts == [scope["reply"].strip()]
