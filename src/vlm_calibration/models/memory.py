"""Estimate the GPU memory of a training step, and of a batch of answers; needs neither a GPU nor the weights.

Weights, gradients and optimiser states follow from the architecture, activations from a step on fake tensors (`activations`,
`answer_memory`). A model of 7 billion parameters takes seconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_calibration.models.activations import TrainingStep, training_peak
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.answer_memory import AnsweringStep, answering_peaks
from vlm_calibration.models.base import BaseModel, Quantization
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.image_tokens import patches_per_token
from vlm_calibration.models.loading import empty_vlm, quantised_layers, use_in_language_model
from vlm_calibration.models.parts import ModelPart
from vlm_calibration.models.sharding import transformer_blocks
from vlm_calibration.models.shared_prefix import ATTENTION, why_not_shared
from vlm_calibration.models.suffix_masks import FAKE_FLEX, FLEX
from vlm_calibration.models.vision_memory import adapted_vision, adapter_parts, pixel_bytes, tower_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Numbers of parameters and bytes of a step, on one GPU.

    Attributes:
        parameters: number of parameters, adapters included.
        trained: number of trained parameters.
        weights: bytes by dtype or quantised format.
        gradients: bytes.
        optimizer: bytes of the optimiser's states.
        activations: peak bytes in the step beside all others.
        logits: peak bytes of these at the output head, loss and gradient included; 0 if they are not told apart.
        pixels: bytes of the batch's images as the processor gives them.
        cache: bytes of the keys and values of prompts and answers.
        buckets: bytes of DDP's copy of the gradients.
        gathered: bytes of weights that are gathered at a time if each GPU stores a share of them.
        largest_gathered: what `gathered` would be: the weights outside the transformer blocks, and two blocks.
        phase: what is done at the peak.
    """

    parameters: int
    trained: int
    weights: dict[str, int]
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    pixels: int = 0
    cache: int = 0
    buckets: int = 0
    gathered: int = 0
    largest_gathered: int = 0
    phase: str = "training step"

    @property
    def total(self) -> int:
        held = self.gradients + self.optimizer + self.pixels + self.cache + self.buckets + self.gathered
        return sum(self.weights.values()) + held + self.activations


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

    Not included: the CUDA context (about half a GiB), fragmentation in the allocator, and what several GPUs add or save
    (`on_each_gpu`).

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
    parts = None if trained is None else tuple(trained)
    model = _model(base, lora, True, step.cast, step.checkpointing, parts).train()
    parameters = dict(model.named_parameters())
    adapters = [p for name, p in parameters.items() if "lora_" in name]
    updated = [p for p in parameters.values() if p.requires_grad]
    weights = Counter(_weight_bytes(model, base.quantization))
    if reference:
        weights.update(_by_dtype(adapters))
    n_trained = sum(p.numel() for p in updated)
    gradients = _bytes(updated)
    if step.responses > 1 and not _shares(base, model, step.row):
        # One pass for each response, all of which are kept for the backward pass.
        step = replace(step, batch=step.batch * step.responses, responses=1, shares_image=step.responses)
    saved = adapted_vision(model, step.images, step.autocast, step.checkpointing)
    # A frozen tower runs before the language model and keeps nothing.
    tower = round(step.images * tower_bytes(model, step.autocast))
    activations, logits = training_peak(model, step)
    return MemoryEstimate(
        parameters=sum(p.numel() for p in parameters.values()) + reference * sum(p.numel() for p in adapters),
        trained=n_trained,
        weights=dict(weights),
        gradients=gradients,
        optimizer=round(optimizer_bytes * n_trained),
        activations=max(activations + saved, tower),
        logits=logits,
        largest_gathered=_gathered(model),
        pixels=pixel_bytes(unwrap_peft(model).config, step.images),
    )


def estimate_answering(
    base: BaseModel,
    step: AnsweringStep,
    *,
    lora: LoraSettings | None = None,
    adapters: int = 0,
    training: bool = False,
) -> MemoryEstimate:
    """Estimate the memory of tensors when a model answers a batch on one GPU.

    Args:
        base: the base model.
        step: the work of one batch.
        lora: the adapters, which are assumed to be alike; None: there are none.
        adapters: how many of them are loaded.
        training: whether the model was loaded for training, as in validation: with other dtypes behind quantised layers.

    Raises:
        DataError: as `estimate_memory`.
    """
    model = _model(base, lora if adapters else None, training, step.cast).eval()
    one = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    parameters = dict(model.named_parameters())
    weights = Counter(_weight_bytes(model, base.quantization))
    for _ in range(adapters - 1):
        weights.update(_by_dtype([p for name, p in parameters.items() if "lora_" in name]))
    tower = round(step.images * tower_bytes(model, step.autocast))
    features = _shared_features(model, step)
    step = replace(step, shared=step.shared and _shares(base, model, step.longest_row))
    peaks = answering_peaks(model, step)
    phase = max(peaks.phases, key=lambda name: peaks.phases[name])
    # The tower runs before there are keys and values, except for perturbed copies.
    held = peaks.cache if step.copied else 0
    images = tower + (held + features if step.copied else 0)
    cache = min(peaks.cache, peaks.phases[phase])
    phase, peak = max((phase, features + peaks.phases[phase]), ("images", images), key=lambda pair: pair[1])
    cache = held if phase == "images" else cache
    return MemoryEstimate(
        parameters=sum(p.numel() for p in parameters.values()) + max(0, adapters - 1) * one,
        trained=0,
        weights=dict(weights),
        activations=peak - cache,
        pixels=pixel_bytes(unwrap_peft(model).config, step.images) * (1 + bool(step.copied)),
        cache=cache,
        phase=phase,
        largest_gathered=_gathered(model),
    )


def _shares(base: BaseModel, model: Any, row: int) -> bool:
    """Whether several responses can share a row of so many tokens with their prompt."""
    custom_mask = base.attn_implementation in (None, *ATTENTION)
    return custom_mask and why_not_shared(model, row) is None


def _shared_features(model: Any, step: AnsweringStep) -> int:
    """Bytes of the results of the frozen tower and projector that several systems share (`vision.shared_vision`)."""
    if step.systems < 2:
        return 0
    config = unwrap_peft(model).config
    widths = (
        config.vision_config.hidden_size * patches_per_token(config) + config.get_text_config().hidden_size
    )
    return round(step.images * widths * (step.autocast or model.dtype).itemsize)


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


def _model(base: BaseModel, lora: LoraSettings | None, *settings: Any) -> Any:
    """The architecture as a stage loads it; the same object for the same settings."""
    config = Path(base.name_or_path) / "config.json"
    state = config.stat().st_mtime_ns if config.is_file() else None
    return _build(base, lora and replace(lora, parts=tuple(lora.parts)), state, *settings)  # type: ignore[arg-type]


@lru_cache(maxsize=4)
def _build(
    base: BaseModel,
    lora: LoraSettings | None,
    state: int | None,
    training: bool,
    cast: torch.dtype | None = None,
    checkpointing: bool = False,
    trained: tuple[ModelPart, ...] | None = None,
) -> Any:
    """The architecture with the dtypes that it is loaded with, and its adapter; `state` is that of its configuration's file."""
    model = empty_vlm(base)
    checkpoint_dtype = model.config.dtype or torch.float32
    dtype = checkpoint_dtype if base.dtype == "auto" else getattr(torch, base.dtype)
    # With "auto" bitsandbytes computes in bfloat16; for training, peft converts weights that are not quantised to float32.
    model.to(torch.float32 if training and base.quantization != "none" else dtype)
    for name in quantised_layers(model) if base.quantization != "none" else ():
        layer = model.get_submodule(name)
        layer.__class__ = _Quantised
        layer.compute_dtype = torch.bfloat16 if base.dtype == "auto" else dtype
        layer.saves_input = base.quantization == "int8"
    if base.attn_implementation == "eager":
        model.set_attn_implementation("eager")
    elif base.attn_implementation == FLEX:
        use_in_language_model(model, FAKE_FLEX)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora is not None:
        with torch.device("meta"):
            model = attach_lora(model, lora)
    if cast is not None:
        model = model.to(cast)
    for name, part in adapter_parts(model).items():
        if trained is not None and part not in trained:
            model.get_parameter(name).requires_grad_(False)
    return model


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


def _gathered(model: Any) -> int:
    """Bytes that are whole at a time under FSDP (`sharding`): parameters outside the blocks, and the two largest blocks."""
    blocks = [_bytes(list(block.parameters())) for block in transformer_blocks(model)]
    return _bytes(list(model.parameters())) - sum(blocks) + sum(sorted(blocks)[-2:])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _by_dtype(tensors: Sequence[Tensor]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[str(tensor.dtype).removeprefix("torch.")] += _bytes([tensor])
    return dict(sizes)
