"""Estimate the activation memory of a training step without computing activations.

A step of the language model runs forward and backward on fake tensors, which have shapes and dtypes but no values, and the
peak of live bytes is counted: tensors saved by autograd, with or without checkpointing, and temporaries. A frozen tower saves
nothing for the backward pass; for an adapted tower the saved bytes are estimated from layer shapes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm_calibration.losses.sequence import token_log_likelihood
from vlm_calibration.models.adapters import unwrapped_name
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.parts import ModelPart, layer_parts

RESPONSE_TOKENS = 16
"""Tokens of an answer with its confidence up to the end of the turn: "a red bicycle. Confidence: 80%" with a margin."""


@dataclass(frozen=True)
class TrainingStep:
    """The work of one process in one training step.

    Args:
        batch: number of prompts, each with one image.
        tokens: tokens of a prompt with its image and one response.
        image_tokens: tokens of the image, used if the tower is adapted; None: all tokens.
        responses: responses per prompt; each further response lengthens the row (see `shared_prefix`).
        checkpointing: recompute activations in the backward pass.
        autocast: dtype of the arithmetic in mixed precision; None: the dtype of the weights.
        cast: dtype to which all weights including the adapter's are converted; None: as loaded.
    """

    batch: int
    tokens: int
    image_tokens: int | None = None
    responses: int = 1
    checkpointing: bool = False
    autocast: torch.dtype | None = torch.bfloat16
    cast: torch.dtype | None = None

    @property
    def row(self) -> int:
        """Tokens per row."""
        return self.tokens + (self.responses - 1) * RESPONSE_TOKENS

    @property
    def labels(self) -> int:
        """Positions per row at which the output head runs."""
        return self.responses * RESPONSE_TOKENS


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors created in this context, for real and for fake tensors.

    Memory that a kernel allocates and frees within one operation is not counted.

    Args:
        existing: earlier tensors, which are not counted, nor are their views.

    Attributes:
        now: live bytes.
        peak: maximum of `now`.
    """

    def __init__(self, existing: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.sizes = {t.untyped_storage()._cdata: 0 for t in existing}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class _Dropout(nn.Dropout):
    """Dropout as on GPUs, which save a mask of one byte per value; CPUs save a factor."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0]


def peak_activations(model: Any, step: TrainingStep) -> tuple[int, int]:
    """Peak bytes of activations in a step of the language model, and of its output head alone."""
    base = unwrap_peft(model)
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    inside = {id(p) for p in decoder.parameters()}
    differentiable = any(p.requires_grad for p in base.parameters() if id(p) not in inside)
    # Fake CPU tensors: tensors on "meta" support neither autocast nor the choice of an attention kernel.
    fake = FakeTensorMode()
    parameters = _make_fake([decoder, head], fake)
    mixed = torch.autocast("cpu", dtype=step.autocast) if step.autocast else nullcontext()
    embeddings = decoder.get_input_embeddings().weight
    labels, width = step.batch * step.labels, embeddings.shape[1]

    def loss_at(hidden: Tensor) -> Tensor:
        with mixed:
            return -token_log_likelihood(head(hidden), torch.zeros(labels, dtype=torch.int64)).sum()

    with fake:
        for parameter in parameters:
            if parameter.requires_grad:  # the state from the second accumulated batch on
                parameter.grad = torch.zeros_like(parameter)
        existing = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        rows = torch.empty(step.batch, step.row, width, dtype=embeddings.dtype, requires_grad=differentiable)
        mask = torch.ones(step.batch, step.row, dtype=torch.int64)
        with LiveBytes(existing) as step_bytes:
            with mixed:
                hidden = decoder(inputs_embeds=rows, attention_mask=mask, use_cache=False).last_hidden_state
            loss_at(hidden[:, -step.labels :].flatten(0, 1)).backward()
        with LiveBytes(existing) as head_bytes:
            loss_at(torch.empty(labels, width, dtype=hidden.dtype, requires_grad=True)).backward()
    return step_bytes.peak, head_bytes.peak


def _make_fake(modules: Sequence[nn.Module], mode: FakeTensorMode) -> list[nn.Parameter]:
    """Replace parameters and buffers by fake tensors, and dropout by that of GPUs; returns the parameters."""
    by_id: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in by_id:
            with mode:
                new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            by_id[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return by_id[id(tensor)]

    for module in dict.fromkeys(m for top in modules for m in top.modules()):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]
        if type(module) is nn.Dropout and module.p:
            module.__class__ = _Dropout
    return [t for t in by_id.values() if isinstance(t, nn.Parameter)]


def adapter_parts(model: Any) -> dict[str, ModelPart]:
    """Name of each adapter parameter -> the part of the model that it belongs to."""
    layers = layer_parts(unwrap_peft(model))
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    return {name: layers[f"{unwrapped_name(name)}.base_layer"] for name in names}


def vision_activations(model: Any, step: TrainingStep) -> int:
    """Bytes that adapted layers outside the language model save for the backward pass, estimated from layer shapes.

    The tower is not run on fake tensors, because its inputs differ between families. Each adapted layer saves its input (for
    the adapter) with one byte per value for dropout's mask, and its output (for attention or an activation function); each
    norm saves its input. With checkpointing each block of the tower saves its input only: recomputation happens after the
    backward pass of the language model and needs less.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapted = {part for name, part in adapter_parts(model).items() if name in trained} - {"language"}
    base = unwrap_peft(model)
    size = (step.autocast or base.dtype).itemsize
    tokens = step.batch * (step.tokens if step.image_tokens is None else step.image_tokens)
    patches = round(tokens * patches_per_token(base.config))
    outside = set(base.modules()) - set(base.get_decoder().modules())
    blocks = [m for m in outside if isinstance(m, GradientCheckpointingLayer)]
    total = 0
    for name, part in layer_parts(base).items():
        if part in adapted and name.endswith("base_layer") and not (part == "tower" and step.checkpointing):
            layer = base.get_submodule(name)
            saved = layer.in_features * (size + 1) + layer.out_features * size
            total += saved * (patches if part == "tower" else tokens)
    if "tower" not in adapted:
        return total
    norms = [m.weight.numel() for block in blocks for m in block.modules() if "Norm" in type(m).__name__]
    widths = [next(m.in_features for m in b.modules() if isinstance(m, nn.Linear)) for b in blocks]
    return total + patches * size * (sum(widths) if step.checkpointing else sum(norms))


def patches_per_token(config: Any) -> float:
    """Patches of an image in the vision tower per token of the image in the language model."""
    vision = config.vision_config
    for owner, name, power in (
        (vision, "spatial_merge_size", 2),
        (config, "scale_factor", 2),
        (config, "downsample_ratio", -2),
    ):
        if factor := getattr(owner, name, None):
            return float(factor**power)
    if tokens := getattr(config, "mm_tokens_per_image", None):
        return (vision.image_size // vision.patch_size) ** 2 / tokens
    return 1.0
