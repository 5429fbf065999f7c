"""Tokens and patches of images by a model's configuration, against what published models and real processors make of images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vlm_calibration.data.pixel_limit import limit_pixels
from vlm_calibration.models.image_tokens import image_tokens, patches_per_token

from .families import build
from .processors import FAMILIES
from .published import MODELS

PUBLISHED = {
    "qwen2_5_vl_7b": ("area", 1, 28 * 28),
    "qwen3_vl_4b": ("area", 1, 32 * 32),
    "smolvlm2_256m": ("tiles", 64, 512 * 512),
    "smolvlm2_2_2b": ("tiles", 81, 384 * 384),
    "internvl3_2b": ("tiles", 256, 448 * 448),
    "llava_1_5_7b": ("fixed", 576, 0),
    "gemma3_4b": ("fixed", 256, 0),
    "paligemma2_3b": ("fixed", 1024, 0),
    "llava_onevision_7b": ("unknown", 0, 0),
}


@pytest.mark.parametrize(("name", "expected"), PUBLISHED.items())
def test_published_models(name: str, expected: tuple[str, int, int]) -> None:
    image = image_tokens(MODELS[name].config())
    assert (image.kind, image.tokens, image.pixels) == expected


@pytest.mark.parametrize(
    ("name", "max_pixels", "tokens"),
    [
        ("qwen2_5_vl_7b", None, None),
        ("qwen2_5_vl_7b", 784 * 1000, 1000),
        ("smolvlm2_256m", None, 17 * 64),
        ("smolvlm2_256m", 4 * 512**2, 5 * 64),
        ("smolvlm2_256m", 512**2, 64),
        ("internvl3_2b", 10**9, 13 * 256),
        ("gemma3_4b", 5000, 256),
        ("llava_onevision_7b", 5000, None),
    ],
)
def test_the_largest_image(name: str, max_pixels: int | None, tokens: int | None) -> None:
    assert image_tokens(MODELS[name].config()).at_most(max_pixels) == tokens


@pytest.mark.parametrize("name", ["qwen2_5_vl_7b", "smolvlm2_256m", "internvl3_2b"])
@pytest.mark.parametrize("tokens", [256, 700, 1024, 2000])
def test_a_limit_keeps_to_the_tokens(name: str, tokens: int) -> None:
    image = image_tokens(MODELS[name].config())
    limit = image.limit(tokens)
    assert limit is not None
    largest = image.at_most(limit)
    assert largest is not None
    assert largest <= tokens
    assert largest > tokens / 2 or largest == image.tokens


def test_families_without_a_limit() -> None:
    for name in ("gemma3_4b", "llava_onevision_7b"):
        assert image_tokens(MODELS[name].config()).limit(500) is None


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_5_vl", "internvl", "llava_clip"])
def test_a_real_processor_makes_as_many_tokens(name: str) -> None:
    """Of a photograph at the limit, with the pixel values that are counted."""
    family = FAMILIES[name]()  # not the cached one, whose processor other tests share
    image = image_tokens(family.model().config)
    if image.kind != "fixed":
        limit_pixels(family.processor, 32 * 32)
    pixels = np.zeros((640, 640, 3), np.uint8)
    inputs = family.processor(
        images=[[pixels]], text=[f"{family.processor.image_token}?"], return_tensors="pt"
    )
    token = family.processor.tokenizer.convert_tokens_to_ids(family.image_token)
    tokens = int((inputs["input_ids"] == token).sum())
    assert image.at_most(32 * 32) == tokens
    assert inputs["pixel_values"].numel() == tokens * image.patches * image.patch_values


def test_towers_without_an_image_size_are_unknown() -> None:
    vision = SimpleNamespace(model_type="other", patch_size=14)
    assert image_tokens(SimpleNamespace(vision_config=vision)).kind == "unknown"
    assert patches_per_token(build("qwen2_5_vl").config) == 4
