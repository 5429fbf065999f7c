"""Estimated memory of detectors and segmenters against tiny ones that run, and the published sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from vlm_calibration.records import DataError
from vlm_calibration.regions import memory
from vlm_calibration.regions.detector import ZeroShotDetector
from vlm_calibration.regions.memory import detector_memory, segmenter_memory
from vlm_calibration.regions.segmenter import PromptedSegmenter

from ..models.steps import allocated
from . import tiny

pytestmark = pytest.mark.slow


def _inputs(name: str, batch: int) -> dict[str, Any]:
    """Inputs of the shapes that the estimate assumes, for a real model."""
    if name == "grounding_dino":
        ids = torch.zeros(batch, memory.PHRASES * memory.PHRASE_TOKENS, dtype=torch.int64)
        size = (memory.SHORTEST, memory.LONGEST)
        inputs = {"input_ids": ids, "token_type_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**inputs, "pixel_mask": torch.ones(batch, *size, dtype=torch.int64)}, size
    if name == "owlv2":
        ids = torch.ones(batch * memory.PHRASES, tiny.CLIP_LENGTH, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (64, 64)
    return {"input_boxes": torch.zeros(batch, memory.BOXES, 4), "multimask_output": False}, (64, 64)


@pytest.mark.parametrize("name", ["grounding_dino", "owlv2", "sam", "sam2"])
def test_an_estimate_is_what_a_model_takes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SHORTEST", 96)
    monkeypatch.setattr(memory, "LONGEST", 160)
    folder, batch = tiny.build(name, tmp_path / name), 6
    is_detector = name in tiny.DETECTORS
    kind: Any = tf.AutoModelForZeroShotObjectDetection if is_detector else tf.AutoModelForMaskGeneration
    model = kind.from_pretrained(folder).eval()
    inputs, size = _inputs(name, batch)
    pixels = torch.zeros(batch, 3, *size)

    def run() -> None:
        with torch.no_grad():
            model(pixel_values=pixels, **inputs)

    run()
    found = (
        detector_memory(ZeroShotDetector(folder), batch)
        if is_detector
        else segmenter_memory(PromptedSegmenter(folder), batch)
    )
    assert found.activations == pytest.approx(allocated(run), rel=0.15)
    assert found.weights == {"float32": sum(p.nbytes for p in model.parameters())}
    assert found.pixels == pixels.nbytes
    half = detector_memory if is_detector else segmenter_memory
    settings: Any = ZeroShotDetector if is_detector else PromptedSegmenter
    assert half(settings(folder, dtype="bfloat16"), batch).weights == {
        "bfloat16": found.weights["float32"] // 2
    }


def test_published_detector_and_segmenter(tmp_path: Path) -> None:
    """Grounding DINO base has 233 million parameters, SAM 2.1 with Hiera large 224 million with its part for videos."""
    swin = tf.SwinConfig(
        image_size=384,
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=12,
        out_indices=[2, 3, 4],
    )
    tf.GroundingDinoConfig(backbone_config=swin, use_timm_backbone=False).save_pretrained(tmp_path / "dino")
    hiera = tf.Sam2HieraDetConfig(
        hidden_size=144,
        num_attention_heads=2,
        blocks_per_stage=[2, 6, 36, 4],
        embed_dim_per_stage=[144, 288, 576, 1152],
        num_attention_heads_per_stage=[2, 4, 8, 16],
        window_size_per_stage=[8, 4, 16, 8],
        global_attention_blocks=[23, 33, 43],
    )
    vision = tf.Sam2VisionConfig(backbone_config=hiera, backbone_channel_list=[1152, 576, 288, 144])
    tf.Sam2Config(vision_config=vision).save_pretrained(tmp_path / "sam")
    detector = detector_memory(ZeroShotDetector(str(tmp_path / "dino")), 8)
    segmenter = segmenter_memory(PromptedSegmenter(str(tmp_path / "sam")), 8)
    assert detector.parameters == pytest.approx(233e6, rel=0.01)
    assert segmenter.parameters == pytest.approx(217e6, rel=0.01)
    for found in (detector, segmenter):
        one = found.activations / 8
        assert 0.1e9 < one < 4e9, "bytes for an image"


def test_another_kind_of_model_is_named(tmp_path: Path) -> None:
    folder = tiny.build("sam", tmp_path / "sam")
    with pytest.raises(DataError, match="cannot load"):
        detector_memory(ZeroShotDetector(folder), 1)
    with pytest.raises(DataError, match="'no/model'"):
        segmenter_memory(PromptedSegmenter("no/model"), 1)
