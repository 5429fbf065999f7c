"""How much memory the activations of a training step take, without computing any.

One step of the language model runs forwards and backwards on tensors that have shapes and dtypes but no values, and what is
alive at its worst moment is counted: what autograd keeps, under checkpointing or not, and what operations need for a
while. A frozen tower keeps nothing for the backward pass; what an adapted one keeps is estimated from its layers' shapes.
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
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.parts import ModelPart, part_of

RESPONSE_TOKENS = 16
"""Tokens of an answer with its confidence, through the end of the turn: "a red bicycle. Confidence: 80%" and some more."""


@dataclass(frozen=True)
class TrainingStep:
    """What one process does in one step.

    Args:
        batch: prompts, each with one image. tokens: of a prompt with its image and one response.
        image_tokens: how many of them stand for the image, which matters where the tower is adapted; None: all.
        responses: to each prompt, of which all but the first make the row longer (see `shared_prefix`).
        checkpointing: activations are computed again in the backward pass.
        autocast: dtype of the arithmetic under mixed precision; None: that of the weights.
        cast: dtype that all weights, the adapter's too, are turned into; None: they stay as loaded.
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
        """Tokens of a row."""
        return self.tokens + (self.responses - 1) * RESPONSE_TOKENS

    @property
    def labels(self) -> int:
        """Tokens of a row at which the output head runs."""
        return self.responses * RESPONSE_TOKENS


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it and still alive: `now`, and the most at any moment, `peak`.

    Works on real tensors and on imagined ones. What a kernel allocates and frees within one operation is not seen.

    Args:
        existing: tensors that were there before and are not counted, whatever views are taken of them.
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
    """Dropout as GPUs do it, with a mask of a byte for each value; CPUs keep a factor."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0]


def worst_moment(model: Any, step: TrainingStep) -> tuple[int, int]:
    """The most bytes of activations in a step of the language model, and the most that its output head has."""
    base = unwrap_peft(model)
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    inside = {id(p) for p in decoder.parameters()}
    differentiable = any(p.requires_grad for p in base.parameters() if id(p) not in inside)
    # Imagined on the CPU: tensors on "meta" know neither autocast nor which attention kernel they would run in.
    imagined = FakeTensorMode()
    parameters = _imagine([decoder, head], imagined)
    mixed = torch.autocast("cpu", dtype=step.autocast) if step.autocast else nullcontext()
    embeddings = decoder.get_input_embeddings().weight
    labels, width = step.batch * step.labels, embeddings.shape[1]

    def loss_at(hidden: Tensor) -> Tensor:
        with mixed:
            return -token_log_likelihood(head(hidden), torch.zeros(labels, dtype=torch.int64)).sum()

    with imagined:
        for parameter in parameters:
            if parameter.requires_grad:  # as it is from the second batch that is accumulated on
                parameter.grad = torch.zeros_like(parameter)
        existing = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        rows = torch.empty(step.batch, step.row, width, dtype=embeddings.dtype, requires_grad=differentiable)
        mask = torch.ones(step.batch, step.row, dtype=torch.int64)
        with LiveBytes(existing) as whole:
            with mixed:
                hidden = decoder(inputs_embeds=rows, attention_mask=mask, use_cache=False).last_hidden_state
            loss_at(hidden[:, -step.labels :].flatten(0, 1)).backward()
        with LiveBytes(existing) as alone:
            loss_at(torch.empty(labels, width, dtype=hidden.dtype, requires_grad=True)).backward()
    return whole.peak, alone.peak


def _imagine(modules: Sequence[nn.Module], mode: FakeTensorMode) -> list[nn.Parameter]:
    """Give modules parameters and buffers without values, and GPUs' dropout; returns the parameters."""
    made: dict[int, Tensor] = {}

    def imagined(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return made[id(tensor)]

    for module in dict.fromkeys(m for top in modules for m in top.modules()):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = imagined(tensor)  # type: ignore[assignment]
        if type(module) is nn.Dropout and module.p:
            module.__class__ = _Dropout
    return [t for t in made.values() if isinstance(t, nn.Parameter)]


def part_of_adapters(model: Any) -> dict[str, ModelPart]:
    """The part of the model that each parameter of an adapter belongs to."""
    base = unwrap_peft(model)
    layers = part_of(base)
    prefix = next(name for name, module in model.named_modules() if module is base)
    found: dict[str, ModelPart] = {}
    for name, _ in model.named_parameters():
        if "lora_" in name:
            layer = name.removeprefix(f"{prefix}.").split(".lora_")[0]
            found[name] = layers[f"{layer}.base_layer"]
    return found


# A tower is not run: its inputs differ from family to family.


def vision_activations(model: Any, step: TrainingStep) -> int:
    """Bytes that adapted layers beside the language model keep until their backward pass, an estimate from their shapes.

    Of each adapted layer one copy of the input (which the adapter needs) with a byte for dropout's mask, and one of the output
    (which attention or an activation function needs); of each norm its input. With checkpointing the input of every block of
    the tower instead: what is computed again comes when the language model is done, and takes less.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapted = {part for name, part in part_of_adapters(model).items() if name in trained} - {"language"}
    base = unwrap_peft(model)
    size = (step.autocast or base.dtype).itemsize
    tokens = step.batch * (step.tokens if step.image_tokens is None else step.image_tokens)
    patches = round(tokens * patches_per_token(base.config))
    outside = set(base.modules()) - set(base.get_decoder().modules())
    blocks = [m for m in outside if isinstance(m, GradientCheckpointingLayer)]
    total = 0
    for name, part in part_of(base).items():
        if part in adapted and name.endswith("base_layer") and not (part == "tower" and step.checkpointing):
            layer = base.get_submodule(name)
            kept = layer.in_features * (size + 1) + layer.out_features * size
            total += kept * (patches if part == "tower" else tokens)
    if "tower" not in adapted:
        return total
    norms = [m.weight.numel() for block in blocks for m in block.modules() if "Norm" in type(m).__name__]
    widths = [next(m.in_features for m in b.modules() if isinstance(m, nn.Linear)) for b in blocks]
    return total + patches * size * (sum(widths) if step.checkpointing else sum(norms))


def patches_per_token(config: Any) -> float:
    """How many patches of an image the vision tower has for each of its tokens in the language model."""
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
