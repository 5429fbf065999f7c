"""Frozen vision computed once for every pass over the same images.

Policy and reference, or a base model and its adapters, see the same images through the same frozen tower. Within
`shared_vision` each frozen part beside the language model runs once, and later passes are given what it found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from vlm_calibration.models.forward import base_of


def frozen_vision(model: Any) -> list[nn.Module]:
    """The outermost modules beside the language model that no adapter and no training changes: tower, projector, ..."""
    base = base_of(model)
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    return list(_frozen(base, {id(decoder), id(head)}))


def _frozen(module: nn.Module, language: set[int]) -> Iterator[nn.Module]:
    for child in module.children():
        inside = {id(m) for m in child.modules()}
        if id(child) in language:
            continue
        if inside & language:
            yield from _frozen(child, language)
        elif not any(isinstance(m, BaseTunerLayer) for m in child.modules()) and not any(
            p.requires_grad for p in child.parameters()
        ):
            yield child


@contextmanager
def shared_vision(model: Any) -> Iterator[None]:
    """Within this context, the frozen vision modules run once; every pass must be over the same images.

    Raises (within):
        ValueError: a frozen module is called with inputs of another shape than the first time.
    """
    modules = frozen_vision(model)
    before = [m.__dict__.get("forward") for m in modules]
    for module in modules:
        module.forward = _Remembered(module.forward)
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.__dict__["forward"]
            else:  # accelerate and bitsandbytes put a forward of their own here
                module.forward = own


class _Remembered:
    """A forward that runs on its first call and gives the same result to all others."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        self.shapes: list[Any] | None = None
        self.result: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shapes = [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if self.shapes is None:
            with torch.no_grad():
                self.result = self.forward(*args, **kwargs)
            self.shapes = shapes
        elif shapes != self.shapes:
            raise ValueError(
                f"shared_vision: inputs of shapes {shapes}, after {self.shapes}: the images must be the same"
            )
        return self.result
