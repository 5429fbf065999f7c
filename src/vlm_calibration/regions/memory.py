"""Estimate the GPU memory of detector and segmenter from their configurations, without their weights.

As for the vision-language models (`models.memory`), a model runs once on fake tensors and live bytes are counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskGeneration, AutoModelForZeroShotObjectDetection

from vlm_calibration.hub import loading
from vlm_calibration.models.fake_tensors import FakeModules, LiveBytes
from vlm_calibration.models.memory import MemoryEstimate
from vlm_calibration.records import DataError
from vlm_calibration.regions.detector import GROUNDING_DINO, OWL, ZeroShotDetector
from vlm_calibration.regions.segmenter import PromptedSegmenter

PHRASES, BOXES = 8, 8
"""Phrases and boxes per image that are assumed; a describer names at most eight objects by default."""
PHRASE_TOKENS = 5
"""Tokens of a phrase in Grounding DINO's text, its separator included."""
SHORTEST, LONGEST = 800, 1333
"""Grounding DINO's image size in pixels: of the sides of any image, unless both are smaller than these."""


def detector_memory(detector: ZeroShotDetector, batch: int) -> MemoryEstimate:
    """Estimate the memory of detection.

    Args:
        detector: its settings; nothing is loaded.
        batch: images at a time.

    Raises:
        DataError: the model does not exist, or is no detector that is supported.
    """
    model = _empty(AutoModelForZeroShotObjectDetection, detector)
    config = model.config
    if config.model_type in GROUNDING_DINO:
        tokens = min(PHRASES * PHRASE_TOKENS, config.max_text_len)
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        size = (SHORTEST, LONGEST)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": ids,
            "pixel_mask": torch.ones(batch, *size, dtype=torch.int64),
        }
    elif config.model_type in OWL:
        tokens = config.text_config.max_position_embeddings
        ids = torch.zeros(batch * PHRASES, tokens, dtype=torch.int64)
        size = (config.vision_config.image_size,) * 2
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        raise DataError(
            f"{detector.name_or_path!r} is a {config.model_type}, expected one of {', '.join((*GROUNDING_DINO, *OWL))}"
        )
    return _estimate(model, (batch, 3, *size), inputs, "detection")


def segmenter_memory(segmenter: PromptedSegmenter, batch: int) -> MemoryEstimate:
    """Estimate the memory of segmentation, without the masks at the size of the image file.

    Args:
        segmenter: its settings; nothing is loaded.
        batch: images at a time.

    Raises:
        DataError: the model does not exist, or cannot segment boxes.
    """
    model = _empty(AutoModelForMaskGeneration, segmenter)
    vision = model.config.vision_config
    side = getattr(vision, "image_size", None) or vision.backbone_config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    boxes = torch.zeros(batch, BOXES, 4)
    inputs = {"input_boxes": boxes, "multimask_output": False}
    return _estimate(model, (batch, 3, height, width), inputs, "segmentation")


def _empty(kind: Any, settings: Any) -> Any:
    """The model with meta tensors, in the dtype of the settings."""
    with loading(kind.__name__, settings.name_or_path):
        config = AutoConfig.from_pretrained(
            settings.name_or_path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=settings.trust_remote_code)
    dtype = (config.dtype or torch.float32) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return model.to(dtype).eval()


def _estimate(model: Any, images: tuple[int, ...], inputs: dict[str, Any], phase: str) -> MemoryEstimate:
    weights: Counter[str] = Counter()
    for parameter in model.parameters():
        weights[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    fakes = FakeModules([model])
    pixels = fakes.tensor(*images, dtype=model.dtype)
    prompts = {k: v.to(model.dtype) if _is_float(v) else v for k, v in inputs.items()}
    with torch.no_grad(), LiveBytes([*fakes.parameters, pixels]) as live:
        model(pixel_values=pixels, **prompts)
    return MemoryEstimate(
        parameters=sum(p.numel() for p in fakes.parameters),
        trained=0,
        weights=dict(weights),
        activations=live.peak,
        pixels=pixels.nbytes,
        phase=phase,
    )


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
