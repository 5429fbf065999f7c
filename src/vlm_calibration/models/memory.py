"""The GPU memory of weights, gradients, optimizer states, and keys and values, by arithmetic; needs neither a GPU nor the weights.

Activations depend on kernels and libraries and are measured (`vlm-calibration estimate-memory --measure`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from vlm_calibration.models.adapters import LoraSettings, ModelPart, attach_lora, layer_parts, unwrapped_name
from vlm_calibration.models.base import BaseModel, Quantization
from vlm_calibration.models.loading import empty_vlm, language_layers

STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Optimizer -> bytes of its states for each trained parameter."""


class Memory(NamedTuple):
    """Bytes on one GPU; and the number of all parameters, adapters included, and of the trained ones.

    Attributes:
        cache: keys and values of a batch of answers at their longest.
        activations: measured, with all else that a step allocates; 0: not measured.
    """

    weights: int
    gradients: int = 0
    optimizer: int = 0
    cache: int = 0
    activations: int = 0
    parameters: int = 0
    trained: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.cache + self.activations


def model_memory(
    base: BaseModel,
    lora: LoraSettings,
    *,
    adapters: int = 1,
    trained: Sequence[ModelPart] | None = None,
    training: bool = True,
    cast: torch.dtype | None = None,
) -> Memory:
    """The weights of a model, and the gradients and number of its trained parameters.

    Args:
        lora: settings of each adapter; a DataError if the model has no linear layer in one of its parts.
        adapters: how many are loaded, with the reference.
        trained: parts of the model whose adapter is trained; None: all that have one.
        training: whether the model is loaded for training, where peft converts what is not quantised to float32.
        cast: dtype that the Trainer converts all weights to; None: as loaded.
    """
    model: Any = empty_vlm(base)
    dtype = (model.config.dtype or torch.float32) if base.dtype == "auto" else getattr(torch, base.dtype)
    layers = language_layers(model) if base.quantization != "none" else {}
    quantised = {id(layer.weight) for layer in layers.values()}
    dtype = cast or (torch.float32 if training and quantised else dtype)
    size = sum(
        quantised_bytes(p.shape, base.quantization) if id(p) in quantised else p.numel() * dtype.itemsize
        for p in model.parameters()
    )
    parameters = sum(p.numel() for p in model.parameters())
    parts = layer_parts(model)
    with torch.device("meta"):
        adapted = attach_lora(model.to(dtype), lora)
    n_trained = gradients = 0
    for name, parameter in ((n, p) for n, p in adapted.named_parameters() if "lora_" in n):
        # peft gives adapters of half-precision models float32, before the Trainer converts anything.
        n_bytes = parameter.numel() * (cast or parameter.dtype).itemsize
        size += adapters * n_bytes
        parameters += adapters * parameter.numel()
        if trained is None or parts[unwrapped_name(name)] in trained:
            n_trained += parameter.numel()
            gradients += n_bytes
    return Memory(size, gradients, parameters=parameters, trained=n_trained)


def quantised_bytes(shape: Sequence[int], quantization: Quantization) -> int:
    """Bytes of a quantised weight [out, in], without each layer's tables of about 1 KiB."""
    n = math.prod(shape)
    if quantization == "int8":
        return n + 4 * shape[0]  # a float32 scale per row
    # Double quantisation: an 8-bit scale per 64 values, and a float32 scale per 256 of these.
    blocks = math.ceil(n / 64)
    return math.ceil(n / 2) + blocks + 4 * math.ceil(blocks / 256)


def cache_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of the keys and values of so many tokens of all rows, at most: layers with a sliding window keep fewer."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * tokens * itemsize)
