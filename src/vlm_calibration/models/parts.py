"""The parts of a vision-language model: language model, vision tower, and the projector between them."""

from __future__ import annotations

from typing import Literal

from torch import nn
from transformers import PreTrainedModel

ModelPart = Literal["language", "tower", "projector"]


def layer_parts(model: PreTrainedModel) -> dict[str, ModelPart]:
    """Full name of each linear layer -> the part of the model that it belongs to; the output head is excluded.

    The language model is the result of `get_decoder`. Other layers belong to the projector if their name contains one of
    transformers' names for it, else to the tower.
    """
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    inside = {id(m) for m in decoder.modules()}
    parts: dict[str, ModelPart] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        if id(module) in inside:
            parts[name] = "language"
        elif any(word in name for word in ("projector", "connector", "merger", "aligner")):
            parts[name] = "projector"
        else:
            parts[name] = "tower"
    return parts
