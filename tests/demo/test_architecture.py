"""The untrained demo model: stock transformers classes, and a tokenizer for the demo's sentences."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm_calibration.demo.scenes import CLASSES, SCENE_SIZE
from vlm_calibration.losses.sequence import IGNORE
from vlm_calibration.models.base import DEMO_MODEL
from vlm_calibration.text.confidence import render_response

from .architecture import IMAGE, IMAGE_TOKENS, PATCH, build_model
from .recipe import scene_patches


def test_the_untrained_model_is_tiny_and_a_function_of_its_seed() -> None:
    model, again, other = build_model(), build_model(), build_model(seed=1)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    names = dict(again.named_parameters())
    assert all(torch.equal(p, names[n]) for n, p in model.named_parameters())
    assert not torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_words_and_percentages_are_one_token(processor: Any) -> None:
    tokenizer = processor.tokenizer
    for word in (*CLASSES, "Yes", "No", *map(str, range(101))):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    for percent in range(101):
        ids = tokenizer(render_response("Yes", percent / 100), add_special_tokens=False)["input_ids"]
        assert len([i for i in ids if tokenizer.decode([i]).strip().isdigit()]) == 1


@pytest.mark.parametrize(
    "text", ["Is there a dog?", "Ünïcödé 日本 🐕", "  two  spaces\nand a line", "50% or 0.5?"]
)
def test_any_text_survives_the_tokenizer(processor: Any, text: str) -> None:
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids) in (text, f" {text}")


def test_the_shipped_folder_is_whole_and_small() -> None:
    assert (DEMO_MODEL / "model.safetensors").stat().st_size <= 8 * 2**20
    model = AutoModelForImageTextToText.from_pretrained(DEMO_MODEL)
    shapes = {name: p.shape for name, p in build_model().named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    processor = AutoProcessor.from_pretrained(DEMO_MODEL)
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    image = np.zeros((SCENE_SIZE, SCENE_SIZE, 3), dtype=np.uint8)
    ids = processor(text=[f"{IMAGE} A dog?"], images=[[image]], return_tensors="pt")["input_ids"]
    assert int((ids == model.config.image_token_id).sum()) == IMAGE_TOKENS
    config = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in config, "no remote code"
    # vLLM reads no other names; transformers reads both.
    names = [name for name in load_file(DEMO_MODEL / "model.safetensors") if name.startswith("vision_tower.")]
    assert {name.split(".")[1] for name in names} == {"vision_model"}


def test_a_patch_is_labelled_with_the_object_that_covers_it(processor: Any) -> None:
    """Patches that no object touches get the image token, and those with little of one no label."""
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    _, words, corners, scene = scene_patches(processor, 0)
    side = scene.image.shape[0] // PATCH
    for index, (word, corner) in enumerate(zip(words.tolist(), corners.tolist(), strict=True)):
        y, x = PATCH * (index // side), PATCH * (index % side)
        shares = [float(o.mask[y : y + PATCH, x : x + PATCH].mean()) for o in scene.objects]
        best = scene.objects[int(np.argmax(shares))]
        if max(shares) > 0.2:
            assert (processor.tokenizer.decode([word]).strip(), corner) == (best.name, best.corner)
        else:
            assert (word, corner) == (IGNORE if sum(shares) else image_token, IGNORE)
    assert len(set(words.tolist())) >= 3
