"""Forward passes that compute no more than is needed: the output head at some positions, and frozen vision modules once.

With a vocabulary of 150k tokens the logits of a conversation are by far its largest tensor. A pre-hook of the head selects hidden
states, so that a family's operations behind the head (scaling, soft-capping) still apply.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vlm_calibration.losses.sequence import IGNORE


class LabelledLogits(NamedTuple):
    """Logits at the N positions that predict a label, float [N, V]; the labels, int64 [N], and their rows in the batch, int64 [N]."""

    logits: Tensor
    targets: Tensor
    rows: Tensor


def labelled_logits(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> LabelledLogits:
    """Logits that predict the labelled tokens; `labels` are int64 [B, L], IGNORE where there is none.

    A ValueError if the first token of a sequence has a label, which no position predicts.
    """
    if bool((labels[:, 0] != IGNORE).any()):
        raise ValueError("the first token of a sequence has a label, but no earlier position predicts it")
    predicted = labels[:, 1:] != IGNORE
    rows, positions = predicted.nonzero(as_tuple=True)
    return LabelledLogits(logits_at(model, inputs, rows, positions), labels[:, 1:][predicted], rows)


def logits_at(model: Any, inputs: Mapping[str, Tensor], rows: Tensor, positions: Tensor) -> Tensor:
    """Logits at N positions of a batch, float [N, V]; `rows` and `positions` are int64 [N]."""

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows, positions][None], *args[1:])

    with unwrap_peft(model).get_output_embeddings().register_forward_pre_hook(select):
        return model(**inputs, use_cache=False).logits[0]


def unwrap_peft(model: Any) -> Any:
    """The transformers model below peft's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def frozen_vision(model: Any) -> list[nn.Module]:
    """The outermost modules outside the language model without an adapter or trained parameters: tower, projector, ..."""
    base = unwrap_peft(model)
    language = {base.get_decoder(), base.get_output_embeddings()}

    def frozen_within(module: nn.Module) -> list[nn.Module]:
        inside = set(module.modules())
        if inside & language:
            children = [] if module in language else module.children()
            return [frozen for child in children for frozen in frozen_within(child)]
        is_adapted = any(isinstance(m, BaseTunerLayer) for m in inside)
        return [] if is_adapted or any(p.requires_grad for p in module.parameters()) else [module]

    return frozen_within(base)


@contextmanager
def shared_vision(model: Any) -> Iterator[None]:
    """Run frozen vision modules once for equal inputs within this context.

    A module whose inputs differ from the first call, such as a frozen projector behind an adapted tower, runs as usual.
    """
    originals = {module: module.__dict__.get("forward") for module in frozen_vision(model)}
    for module in originals:
        module.forward = _run_once(module.forward)
    try:
        yield
    finally:
        for module, original in originals.items():
            if original is None:
                del module.__dict__["forward"]
            else:  # accelerate and bitsandbytes replace `forward` on the instance
                module.forward = original


def _run_once(forward: Any) -> Any:
    cached: list[Any] = []  # the inputs and the result of the first call

    def run(*args: Any, **kwargs: Any) -> Any:
        inputs = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if any(v.requires_grad for v in inputs):
            return forward(*args, **kwargs)
        if not cached:
            with torch.no_grad():
                cached[:] = inputs, forward(*args, **kwargs)
        elif len(inputs) != len(cached[0]) or not all(map(torch.equal, inputs, cached[0])):
            return forward(*args, **kwargs)
        # Some families replace fields of the tower's output in place.
        return copy(cached[1])

    return run


def shard(model: Any, mesh: DeviceMesh) -> None:
    """Shard the model over a mesh of processes, in place. Every process must then run the same passes."""
    base = unwrap_peft(model)
    blocks = {name for m in base.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    for unit in [*(m for m in base.modules() if type(m).__name__ in blocks), base]:
        # The rest of the model too: every unit is sharded between passes.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """Gather all trained and adapter weights; every process must call it. None if the model is not sharded."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    return {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad or "lora_" in name
    }
