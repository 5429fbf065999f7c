"""How much memory a training step takes on one GPU, found without a GPU and without the weights.

Weights, gradients and optimiser states follow from the architecture, activations from a step on tensors without values
(`activations`). A model of 7 billion parameters takes seconds.
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
    part_of_adapters,
    vision_activations,
    worst_moment,
)
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.loading import BaseModel, Quantization, empty_vlm, quantised_layers
from vlm_calibration.models.parts import ModelPart


@dataclass(frozen=True)
class MemoryEstimate:
    """Numbers of parameters, and bytes.

    parameters: with the adapters. trained: those of the adapter that is trained. weights: by dtype, or by the quantised
    format. activations: the most that is alive at any moment of a step beside weights, gradients and optimiser states.
    logits: the most of that at the output head, with loss and gradient.
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
    """What training this adapter takes on one GPU.

    These are its tensors. The CUDA context (about half a GiB), what the allocator loses between tensors, and the second copy of
    the gradients that DDP keeps come on top.

    Args:
        optimizer_bytes: of the optimiser's states for each trained parameter; 8 for AdamW, 2 for 8-bit AdamW.
        reference: a second, frozen copy of the adapter is there to compare with.
        trained: parts of the model whose adapters are trained; None: all that have one.

    Raises:
        DataError: there is no such model, or it has no linear layer in one of the parts.
    """
    model = _adapted(base, lora, step)
    for name, part in part_of_adapters(model).items():
        if trained is not None and part not in trained:
            model.get_parameter(name).requires_grad_(False)
    parameters = dict(model.named_parameters())
    adapters = [p for name, p in parameters.items() if "lora_" in name]
    updated = [p for p in parameters.values() if p.requires_grad]
    weights = Counter(_weight_bytes(model, base.quantization))
    if reference:
        weights.update(_by_dtype(adapters))
    n_trained = sum(p.numel() for p in updated)
    activations, logits = worst_moment(model, step)
    return MemoryEstimate(
        parameters=sum(p.numel() for p in parameters.values()) + reference * sum(p.numel() for p in adapters),
        trained=n_trained,
        weights=dict(weights),
        gradients=_bytes(updated),
        optimizer=round(optimizer_bytes * n_trained),
        activations=activations + vision_activations(model, step),
        logits=logits,
    )


# --- Weights ------------------------------------------------------------------------------------------------------


class _Quantised(nn.Linear):
    """Stands in for a layer of bitsandbytes: the arithmetic in one dtype, the result in that of the input."""

    compute_dtype: torch.dtype
    keeps_input: bool

    def forward(self, x: Tensor) -> Tensor:
        return _QuantisedProduct.apply(x, self.weight, self.bias, self.compute_dtype, self.keeps_input)


class _QuantisedProduct(torch.autograd.Function):
    """A product with weights that are dequantised when needed; int8 keeps its input even where weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: Any, keeps: bool) -> Tensor:
        ctx.weight, ctx.dtype, ctx.kept = weight, dtype, x if keeps else None
        product = nn.functional.linear(x.to(dtype), weight.to(dtype, copy=True))
        return (product if bias is None else product + bias.to(dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        product = gradient.to(ctx.dtype) @ ctx.weight.to(ctx.dtype, copy=True)
        return product.to(gradient.dtype), None, None, None, None


def _adapted(base: BaseModel, lora: LoraSettings, step: TrainingStep) -> Any:
    """The architecture with its adapter, in train mode, each parameter of the dtype that it has in training."""
    model = empty_vlm(base)
    stated = model.config.dtype or torch.float32
    dtype = stated if base.dtype == "auto" else getattr(torch, base.dtype)
    # In `auto` bitsandbytes computes in bfloat16; peft turns into float32 what is not quantised.
    model.to(dtype if base.quantization == "none" else torch.float32)
    for name in quantised_layers(model) if base.quantization != "none" else ():
        layer = model.get_submodule(name)
        layer.__class__ = _Quantised
        layer.compute_dtype = torch.bfloat16 if base.dtype == "auto" else dtype
        layer.keeps_input = base.quantization == "int8"
    if base.attn_implementation == "eager":
        model.set_attn_implementation("eager")
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.device("meta"):
        adapted = attach_lora(model, lora)
    return adapted.to(step.cast).train() if step.cast else adapted.train()


def _weight_bytes(model: Any, quantization: Quantization) -> dict[str, int]:
    found: Counter[str] = Counter()
    quantised = {id(m.weight) for m in model.modules() if isinstance(m, _Quantised)}
    for parameter in model.parameters():
        if id(parameter) in quantised:
            found[quantization] += quantised_bytes(parameter.shape, quantization)
        else:
            found.update(_by_dtype([parameter]))
    return dict(found)


def quantised_bytes(shape: Sequence[int], quantization: Quantization) -> int:
    """Bytes of a quantised weight [out, in].

    int8: a byte each, and a float32 scale a row. nf4 with double quantisation: 4 bits each, an 8-bit scale for every 64, and
    for every 256 of those a float32 scale; without the tables of about 1 KiB that each layer has beside them.
    """
    n = math.prod(shape)
    if quantization == "int8":
        return n + 4 * shape[0]
    blocks = math.ceil(n / 64)
    return math.ceil(n / 2) + blocks + 4 * math.ceil(blocks / 256)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _by_dtype(tensors: Sequence[Tensor]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for tensor in tensors:
        found[str(tensor.dtype).removeprefix("torch.")] += _bytes([tensor])
    return dict(found)
