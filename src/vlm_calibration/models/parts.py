"""The parts of a vision-language model: language model, vision tower, and the projector between them."""

from __future__ import annotations

from typing import Literal

from torch import nn
from transformers import PreTrainedModel

ModelPart = Literal["language", "tower", "projector"]


def part_of(model: PreTrainedModel) -> dict[str, ModelPart]:
    """The part of the model that each linear layer belongs to, by its full name; the output head is in none.

    The language model is what `get_decoder` returns. Of the rest, layers below a module whose name ends in one of the
    names that transformers gives to projectors are the projector, and all others the tower.
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
