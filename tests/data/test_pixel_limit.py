"""`data.max_pixels`: what processors make of large and small images under a limit, in memory and saved."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from vlm_calibration.data.module import PerturbedQueryDataModule, load_processor
from vlm_calibration.data.resolution import check_resolution, limit_pixels, model_resolution
from vlm_calibration.presets import read_config
from vlm_calibration.records import DataError

from ..models.processors import PUBLISHED, cached_family, published_family
from .test_resolution import CLIP, INTERNVL, ONEVISION, PIXTRAL, QWEN2, SIGLIP, SMOLVLM

LIMITED = {"QWEN2": QWEN2, "SMOLVLM": SMOLVLM, "INTERNVL": INTERNVL, "PIXTRAL": PIXTRAL}
SIDES = st.integers(8, 400)
TEXT_TOKENS = 256
"""Tokens of a prompt and its response beside the image: question, request for a confidence, chat template, answer."""


def _limited(image_processor: Any, max_pixels: int, **settings: Any) -> Any:
    """A copy of the image processor with the limit."""
    image_processor = copy.deepcopy(image_processor)
    limit_pixels(SimpleNamespace(image_processor=image_processor, **settings), max_pixels)
    return image_processor


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(sorted(LIMITED)), height=SIDES, width=SIDES, max_pixels=st.integers(2304, 30000))
@example(name="QWEN2", height=50, width=400, max_pixels=2304)
def test_no_image_has_more_pixels(name: str, height: int, width: int, max_pixels: int) -> None:
    # Of an image that is one patch wide, Qwen's processors keep that patch.
    assume(max(height, width) <= 8 * min(height, width))
    limited = _limited(LIMITED[name], max_pixels)
    assert math.prod(model_resolution(limited, height, width)) <= max_pixels


@pytest.mark.parametrize("name", [*LIMITED, "CLIP"])
def test_a_limit_above_the_processor_s_own_changes_nothing(name: str) -> None:
    image_processor = {**LIMITED, "CLIP": CLIP}[name]
    assert _limited(image_processor, 300_000).to_dict() == image_processor.to_dict()


def test_most_of_the_limit_is_used() -> None:
    assert math.prod(model_resolution(_limited(QWEN2, 5000), 300, 200)) > 0.8 * 5000
    assert math.prod(model_resolution(_limited(INTERNVL, 7 * 48**2), 300, 200)) == 6 * 48**2
    assert model_resolution(_limited(SMOLVLM, 3 * 80**2), 300, 300) == (120, 120)


@pytest.mark.parametrize("image_processor", [CLIP, SIGLIP], ids=["crop", "fixed"])
def test_images_of_one_size_cannot_be_limited_below_it(image_processor: Any) -> None:
    pixels = 48 * 48 if image_processor is CLIP else 40 * 56
    limit_pixels(SimpleNamespace(image_processor=image_processor), pixels)
    with pytest.raises(DataError, match=rf"data\.max_pixels: .*{pixels} pixels"):
        limit_pixels(SimpleNamespace(image_processor=image_processor), pixels - 1)


@pytest.mark.parametrize(
    ("image_processor", "smallest"), [(QWEN2, 64), (INTERNVL, 48**2), (SMOLVLM, 40**2), (PIXTRAL, 64)]
)
def test_a_limit_below_the_smallest_image_names_it(image_processor: Any, smallest: int) -> None:
    _limited(image_processor, smallest)
    with pytest.raises(DataError, match=rf"data\.max_pixels: .* at least {smallest}"):
        _limited(image_processor, smallest - 1)


def test_grids_that_the_model_lists_as_well_are_refused() -> None:
    with pytest.raises(DataError, match="LlavaOnevisionImageProcessor.*no setting"):
        _limited(ONEVISION, 48**2)
    with pytest.raises(DataError, match="at least 1, found 0"):
        _limited(QWEN2, 0)
    unknown = transformers.CLIPImageProcessor(size={"shortest_edge": 48}, do_center_crop=False)
    with pytest.raises(DataError, match="CLIPImageProcessor.*no setting"):
        _limited(unknown, 48**2)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "internvl"])
def test_a_saved_processor_keeps_the_limit(name: str, tmp_path: Path) -> None:
    """What the model is given of a photograph, by a saved and reloaded processor as by the one in memory."""
    cached_family(name).processor.save_pretrained(tmp_path / "base")
    data = PerturbedQueryDataModule(str(tmp_path / "base"), max_pixels=16 * 32)
    check_resolution(data.processor)
    data.processor.save_pretrained(tmp_path / "adapter")
    photograph = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    text = data.chat.render("A dog?")
    sizes = [
        load_processor(str(folder))(images=[[photograph]], text=[text], return_tensors="pt")
        for folder in (tmp_path / "base", tmp_path / "adapter")
    ]
    limited = data.processor(images=[[photograph]], text=[text], return_tensors="pt")
    assert sizes[1]["pixel_values"].shape == limited["pixel_values"].shape
    assert sizes[1]["input_ids"].tolist() == limited["input_ids"].tolist()
    assert limited["input_ids"].shape[1] < sizes[0]["input_ids"].shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_room_for_a_photograph_and_its_text(name: str) -> None:
    """Of 12 megapixels, upright or a panorama; `test_every_file_is_of_a_published_model` has all presets among these."""
    data, family = read_config(f"model/{name}")["data"], published_family(name)
    processor = family.processor
    if "max_pixels" in data:
        limit_pixels(processor, data["max_pixels"])
    for height, width in ((4000, 3000), (2000, 6000)):
        photograph = np.zeros((height, width, 3), np.uint8)
        inputs = processor(images=[[photograph]], text=[processor.image_token], return_tensors="pt")
        assert inputs["input_ids"].shape[1] + TEXT_TOKENS <= data["max_length"]
