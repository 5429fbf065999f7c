"""Estimate the GPU memory of a training step; needs neither a GPU nor the weights.

Weights, gradients and optimiser states follow from the architecture, activations from a step on fake tensors (`activations`).
A model of 7 billion parameters takes seconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_calibration.models.activations import (
    TrainingStep,
    adapter_parts,
    peak_activations,
    vision_activations,
)
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.base import BaseModel, Quantization
from vlm_calibration.models.loading import empty_vlm, quantised_layers
from vlm_calibration.models.parts import ModelPart


@dataclass(frozen=True)
class MemoryEstimate:
    """Numbers of parameters and bytes of a training step.

    Attributes:
        parameters: number of parameters, adapters included.
        trained: number of trained parameters.
        weights: bytes by dtype or quantised format.
        gradients: bytes.
        optimizer: bytes of the optimiser's states.
        activations: peak bytes in a step beside weights, gradients and optimiser states.
        logits: peak bytes of these at the output head, loss and gradient included.
    """

    parameters: int
    trained: int
    weights: dict[str, int]
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.gradients + self.optimizer + self.activations


def estimate_memory(
    base: BaseModel,
    lora: LoraSettings,
    step: TrainingStep,
    *,
    optimizer_bytes: float = 8,
    reference: bool = False,
    trained: Sequence[ModelPart] | None = None,
) -> MemoryEstimate:
    """Estimate the memory of tensors when an adapter is trained on one GPU.

    Not included: the CUDA context (about half a GiB), fragmentation in the allocator, and DDP's copy of the gradients.

    Args:
        base: the base model.
        lora: the adapter.
        step: the work of one step.
        optimizer_bytes: bytes of the optimiser's states per trained parameter; 8 for AdamW, 2 for 8-bit AdamW.
        reference: whether a frozen copy of the adapter is loaded as the reference.
        trained: parts of the model whose adapters are trained; None: all parts with an adapter.

    Raises:
        DataError: the model does not exist, or has no linear layer in one of the parts.
    """
    model = _build_adapted(base, lora, step)
    for name, part in adapter_parts(model).items():
        if trained is not None and part not in trained:
            model.get_parameter(name).requires_grad_(False)
    parameters = dict(model.named_parameters())
    adapters = [p for name, p in parameters.items() if "lora_" in name]
    updated = [p for p in parameters.values() if p.requires_grad]
    weights = Counter(_weight_bytes(model, base.quantization))
    if reference:
        weights.update(_by_dtype(adapters))
    n_trained = sum(p.numel() for p in updated)
    activations, logits = peak_activations(model, step)
    return MemoryEstimate(
        parameters=sum(p.numel() for p in parameters.values()) + reference * sum(p.numel() for p in adapters),
        trained=n_trained,
        weights=dict(weights),
        gradients=_bytes(updated),
        optimizer=round(optimizer_bytes * n_trained),
        activations=activations + vision_activations(model, step),
        logits=logits,
    )


# --- Weights --------------------------------------------------------------------------------------------------------


class _Quantised(nn.Linear):
    """Replacement of a bitsandbytes layer: computes in one dtype and returns the dtype of the input."""

    compute_dtype: torch.dtype
    saves_input: bool

    def forward(self, x: Tensor) -> Tensor:
        return _QuantisedProduct.apply(x, self.weight, self.bias, self.compute_dtype, self.saves_input)


class _QuantisedProduct(torch.autograd.Function):
    """A product with weights that are dequantised on use; int8 saves its input even if weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: Any, saves: bool) -> Tensor:
        ctx.weight, ctx.dtype, ctx.input = weight, dtype, x if saves else None
        product = nn.functional.linear(x.to(dtype), weight.to(dtype, copy=True))
        return (product if bias is None else product + bias.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        product = gradient.to(ctx.dtype) @ ctx.weight.to(ctx.dtype, copy=True)
        return product.to(gradient.dtype), None, None, None, None


def _build_adapted(base: BaseModel, lora: LoraSettings, step: TrainingStep) -> Any:
    """The architecture with its adapter in train mode, with the dtypes of training."""
    model = empty_vlm(base)
    checkpoint_dtype = model.config.dtype or torch.float32
    dtype = checkpoint_dtype if base.dtype == "auto" else getattr(torch, base.dtype)
    # With "auto" bitsandbytes computes in bfloat16; peft converts weights that are not quantised to float32.
    model.to(dtype if base.quantization == "none" else torch.float32)
    for name in quantised_layers(model) if base.quantization != "none" else ():
        layer = model.get_submodule(name)
        layer.__class__ = _Quantised
        layer.compute_dtype = torch.bfloat16 if base.dtype == "auto" else dtype
        layer.saves_input = base.quantization == "int8"
    if base.attn_implementation == "eager":
        model.set_attn_implementation("eager")
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.device("meta"):
        adapted = attach_lora(model, lora)
    return adapted.to(step.cast).train() if step.cast else adapted.train()


def _weight_bytes(model: Any, quantization: Quantization) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    quantised = {id(m.weight) for m in model.modules() if isinstance(m, _Quantised)}
    for parameter in model.parameters():
        if id(parameter) in quantised:
            sizes[quantization] += quantised_bytes(parameter.shape, quantization)
        else:
            sizes.update(_by_dtype([parameter]))
    return dict(sizes)


def quantised_bytes(shape: Sequence[int], quantization: Quantization) -> int:
    """Bytes of a quantised weight [out, in].

    int8: one byte per value and a float32 scale per row. nf4 with double quantisation: 4 bits per value, an 8-bit scale per
    64 values, and a float32 scale per 256 of these; each layer's tables of about 1 KiB are not counted.
    """
    n = math.prod(shape)
    if quantization == "int8":
        return n + 4 * shape[0]
    blocks = math.ceil(n / 64)
    return math.ceil(n / 2) + blocks + 4 * math.ceil(blocks / 256)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _by_dtype(tensors: Sequence[Tensor]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[str(tensor.dtype).removeprefix("torch.")] += _bytes([tensor])
    return dict(sizes)
