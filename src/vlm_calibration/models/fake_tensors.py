"""A model with fake tensors, which have shapes and dtypes but no values, and a count of the bytes that its passes allocate.

The model runs on a CPU without its weights, in seconds even with billions of parameters. Parameters are fake and small inputs that
decide shapes, such as the grid of an image, are real: passes run outside the mode of fake tensors, so that code that reads the values of
such an input still can.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from vlm_calibration.models.suffix_masks import FAKE_FLEX


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
        if not self.training:
            return x
        return torch.native_dropout(x, self.p, True)[0]


class _FlexAttention(torch.autograd.Function):
    """FlexAttention, which does not run on fake tensors: saves its inputs, its result, and a number for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result, torch.empty_like(query[..., 0], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, log_sum = ctx.saved_tensors
        torch.empty_like(log_sum)  # of gradient and result, their product for each query
        return tuple(map(torch.empty_like, (query, key, value)))


def _flex_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Attention of heads [B, H, L, E] with keys and values of fewer heads, as transformers calls FlexAttention."""
    heads = query.shape[1]
    if heads & (heads - 1):  # no power of two: transformers repeats keys and values
        key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    result = _FlexAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype))
    return result.transpose(1, 2).contiguous(), None


# Without a mask function of that name, transformers makes no mask.
AttentionInterface.register(FAKE_FLEX, _flex_attention)


class FakeModules:
    """Modules whose parameters and buffers are replaced by fake ones on the CPU, in place.

    Tensors on "meta" support neither autocast nor the choice of an attention kernel.

    Args:
        modules: with parameters on any device; shared parameters stay shared.

    Attributes:
        mode: in which new tensors are fake.
        parameters: the fake parameters.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        by_id: dict[int, Tensor] = {}

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in by_id:
                with self.mode:
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
        self.parameters = [t for t in by_id.values() if isinstance(t, nn.Parameter)]

    def tensor(self, *shape: int, dtype: torch.dtype, requires_grad: bool = False) -> Tensor:
        """A fake tensor of this shape."""
        with self.mode:
            return torch.empty(shape, dtype=dtype, requires_grad=requires_grad)


def autocast(dtype: torch.dtype | None) -> Any:
    """The arithmetic of mixed precision in this dtype; None: that of the weights."""
    return torch.autocast("cpu", dtype=dtype) if dtype else nullcontext()


FEW, MORE = 3, 5
"""Numbers of layers from which the peak of a model with more is extrapolated."""


def over_layers(decoder: Any, run: Callable[[], Mapping[str, int]]) -> dict[str, int]:
    """Bytes that a pass of a language model takes, from passes of its first layers where all layers are alike.

    Bytes are then linear in the number of layers. Layers of several kinds, such as full and sliding attention, all run.

    Args:
        decoder: with its layers as `layers`.
        run: runs the model; name -> bytes.
    """
    layers = getattr(decoder, "layers", None)
    kinds = set(getattr(decoder.config, "layer_types", None) or ())
    if not isinstance(layers, nn.ModuleList) or len(layers) <= MORE + 1 or len(kinds) > 1:
        return dict(run())
    results = []
    try:
        for number in (FEW, MORE):
            decoder.layers = layers[:number]
            results.append(run())
    finally:
        decoder.layers = layers
    few, more = results
    beyond = (len(layers) - MORE) / (MORE - FEW)
    return {name: round(more[name] + (more[name] - few[name]) * beyond) for name in more}
