"""Estimate the memory that the images of a batch take: their pixels, and the vision tower's passes with and without gradients.

A frozen tower runs on fake tensors (`fake_tensors`) for a few images, and its peak is proportional to the number of patches. An adapted
one saves activations for the backward pass, which are estimated from the shapes of its layers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm_calibration.models.adapters import unwrapped_name
from vlm_calibration.models.fake_tensors import FakeModules, LiveBytes, autocast
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.image_tokens import image_tokens, patches_per_token
from vlm_calibration.models.parts import ModelPart, layer_parts

TOWERS = ("visual", "vision_tower", "vision_model")
"""Names of the vision tower in transformers."""
GRID = (32, 32)
"""Rows and columns of patches of the image that a tower of images of any size is run on."""


def pixel_bytes(config: Any, tokens: int) -> int:
    """Bytes of the pixel values of images with so many tokens in all, which processors give in float32."""
    image = image_tokens(config)
    return round(tokens * image.patches * image.patch_values * torch.float32.itemsize)


@lru_cache(maxsize=8)
def tower_bytes(model: Any, dtype: torch.dtype | None) -> float:
    """Peak bytes of a pass of the vision tower without gradients, per token of its images; 0 if its images are not known here.

    Args:
        model: a transformers or peft model.
        dtype: of the arithmetic in mixed precision, as in `TrainingStep`.
    """
    base = unwrap_peft(model)
    named = dict(base.named_modules())
    tower = next((m for name, m in named.items() if name.rpartition(".")[-1] in TOWERS), None)
    config = base.config.vision_config
    side: Any = getattr(config, "image_size", None)
    grid = hasattr(config, "spatial_merge_size")
    if tower is None or not (grid or side):
        return 0
    fakes = FakeModules([tower])
    settings: dict[str, Tensor] = {}
    if grid:
        patches = GRID[0] * GRID[1]
        pixels = fakes.tensor(patches, image_tokens(base.config).patch_values, dtype=torch.float32)
        settings["grid_thw"] = torch.tensor([[1, *GRID]])
    else:
        height, width = (side, side) if isinstance(side, int) else side
        per_image = round(image_tokens(base.config).tokens * patches_per_token(base.config))
        patches = per_image or height * width // config.patch_size**2
        pixels = fakes.tensor(1, 3, height, width, dtype=torch.float32)
    with torch.no_grad(), autocast(dtype), LiveBytes([*fakes.parameters, pixels]) as live:
        values = pixels.to(next(tower.parameters()).dtype)
        tower(values, **settings)
    return live.peak * patches_per_token(base.config) / patches


def adapter_parts(model: Any) -> dict[str, ModelPart]:
    """Name of each adapter parameter -> the part of the model that it belongs to."""
    layers = layer_parts(unwrap_peft(model))
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    return {name: layers[f"{unwrapped_name(name)}.base_layer"] for name in names}


def adapted_vision(model: Any, tokens: int, dtype: torch.dtype | None, checkpointing: bool) -> int:
    """Bytes that adapted layers outside the language model save for the backward pass, estimated from layer shapes.

    Each adapted layer saves its input (for the adapter) with one byte per value for dropout's mask, and its output (for attention or
    an activation function); each norm saves its input. With checkpointing each block of the tower saves its input only:
    recomputation happens after the backward pass of the language model and needs less.

    Args:
        model: a peft model.
        tokens: tokens in the language model of all images of a batch.
        dtype: of the arithmetic in mixed precision, as in `TrainingStep`.
        checkpointing: whether activations are recomputed.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapted = {part for name, part in adapter_parts(model).items() if name in trained} - {"language"}
    base = unwrap_peft(model)
    size = (dtype or base.dtype).itemsize
    patches = round(tokens * patches_per_token(base.config))
    outside = set(base.modules()) - set(base.get_decoder().modules())
    blocks = [m for m in outside if isinstance(m, GradientCheckpointingLayer)]
    total = 0
    for name, part in layer_parts(base).items():
        if part in adapted and name.endswith("base_layer") and not (part == "tower" and checkpointing):
            layer = base.get_submodule(name)
            saved = layer.in_features * (size + 1) + layer.out_features * size
            total += saved * (patches if part == "tower" else tokens)
    if "tower" not in adapted:
        return total
    norms = [m.weight.numel() for block in blocks for m in block.modules() if "Norm" in type(m).__name__]
    widths = [next(m.in_features for m in b.modules() if isinstance(m, nn.Linear)) for b in blocks]
    return total + patches * size * (sum(widths) if checkpointing else sum(norms))
