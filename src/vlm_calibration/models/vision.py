"""Frozen vision computed once for every pass over the same images.

Policy and reference, or a base model and its adapters, see the same images through the same frozen tower. Within
`shared_vision` each frozen part beside the language model runs once, and later passes are given what it found.
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
    """The outermost modules beside the language model that no adapter and no training changes: tower, projector, ..."""
    base = unwrap_peft(model)
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
    """Within this context, frozen vision modules run once for the same inputs.

    One that is given other inputs than the first time, such as a frozen projector behind an adapted tower, runs as usual.
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
    """A forward that runs on its first call and gives the same result to all others with the same inputs."""

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
        # Some families replace parts of what their tower returned.
        return copy(self.result)
