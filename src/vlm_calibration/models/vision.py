"""Frozen vision modules computed once for several passes over the same images.

Policy and reference, or a base model and its adapters, encode the same images with the same frozen tower. Within
`shared_vision` each frozen module outside the language model runs once, and later passes reuse its result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from vlm_calibration.models.forward import unwrap_peft


def frozen_vision(model: Any) -> list[nn.Module]:
    """The outermost modules outside the language model without an adapter or trained parameters: tower, projector, ..."""
    base = unwrap_peft(model)
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    return list(_frozen_modules(base, {id(decoder), id(head)}))


def _frozen_modules(module: nn.Module, language: set[int]) -> Iterator[nn.Module]:
    for child in module.children():
        inside = {id(m) for m in child.modules()}
        if id(child) in language:
            continue
        if inside & language:
            yield from _frozen_modules(child, language)
        elif not any(isinstance(m, BaseTunerLayer) for m in child.modules()) and not any(
            p.requires_grad for p in child.parameters()
        ):
            yield child


@contextmanager
def shared_vision(model: Any) -> Iterator[None]:
    """Run frozen vision modules once for equal inputs within this context.

    A module whose inputs differ from the first call, such as a frozen projector behind an adapted tower, runs as usual.
    """
    modules = frozen_vision(model)
    originals = [m.__dict__.get("forward") for m in modules]
    for module in modules:
        module.forward = _CachedForward(module.forward)
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            if original is None:
                del module.__dict__["forward"]
            else:  # accelerate and bitsandbytes replace `forward` on the instance
                module.forward = original


class _CachedForward:
    """A forward that runs on its first call, and returns that result again for equal inputs."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        self.inputs: list[Tensor] | None = None
        self.result: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if any(v.requires_grad for v in inputs):
            return self.forward(*args, **kwargs)
        if self.inputs is None:
            with torch.no_grad():
                self.result = self.forward(*args, **kwargs)
            self.inputs = inputs
        elif len(inputs) != len(self.inputs) or not all(map(torch.equal, inputs, self.inputs)):
            return self.forward(*args, **kwargs)
        # Some families replace fields of the tower's output in place.
        return copy(self.result)
