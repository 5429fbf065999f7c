"""Merging an adapter into its base model, with proof that it was merged.

Merging goes wrong silently: where the names in an adapter do not fit the model, peft adapts nothing, merges nothing, and the
result is the base model. So what is merged is counted and compared here, layer by layer, and what is written is read back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from vlm_calibration.hub import first_line, loading
from vlm_calibration.models.adapters import load_adapters
from vlm_calibration.models.base import BaseModel, Dtype
from vlm_calibration.models.loading import load_base
from vlm_calibration.records import DataError


class Merged(NamedTuple):
    """model: with the adapter in its weights, in eval mode. layers: names of the layers that hold it."""

    model: PreTrainedModel
    layers: tuple[str, ...]


def merge_adapter(folder: str, base: BaseModel, dtype: Dtype = "auto") -> Merged:
    """Merge a LoRA adapter into its base model in float32, 4 bytes a parameter of CPU memory.

    Args:
        folder: the adapter, as peft saves it.
        base: its base model; dtype and quantisation are not heeded. An adapter that was trained on a quantised base is
            merged into the one in full precision.
        dtype: of the merged weights; "auto": that of the base's checkpoint.

    Raises:
        DataError: the base cannot be loaded or is stored quantised, the adapter does not fit it, or merging did not change
            every layer that the adapter holds an update of.
    """
    target = _target_dtype(base, dtype)
    model = load_base(replace(base, dtype="float32", quantization="none"))
    with _about(folder, base):
        wrapped = load_adapters(model, {"default": folder})
        assert isinstance(wrapped, PeftModel)
        if wrapped.peft_config["default"].peft_type != PeftType.LORA:
            raise ValueError("it is no LoRA adapter")
        held = held_layers(folder)
        layers = {name: m for name, m in wrapped.named_modules() if isinstance(m, LoraLayer)}
        if len(layers) != len(held):
            raise ValueError(f"it holds {len(held)} layers, of which the model has {len(layers)}")
        _check_shared(wrapped, layers)
        _merge_each(layers, sum(not moves for moves in held.values()), target)
        merged = wrapped.merge_and_unload()
    return Merged(merged.to(target).eval(), tuple(map(_plain, layers)))


def held_layers(folder: str) -> dict[str, bool]:
    """The layers that a LoRA adapter's file holds, by their names there, and whether each update differs from zero."""
    found: dict[str, bool] = {}
    for name, weight in load_peft_weights(folder, device="cpu").items():
        layer, is_lora, which = name.partition(".lora_")
        if is_lora:
            moves = which.startswith(("B", "embedding_B")) and bool(weight.any())
            found[layer] = found.get(layer, False) or moves
    return found


def save_merged(model: PreTrainedModel, folder: Path, trust_remote_code: bool = False) -> None:
    """Write the model, and check that transformers reads the same weights back.

    Raises:
        DataError: it cannot be written, or what is read back differs.
    """
    try:
        model.save_pretrained(folder)
        again, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write the merged model: {first_line(error)}") from error
    read = again.state_dict()
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    wrong += [name for name, weight in model.state_dict().items() if not _same(weight, read.get(name))]
    if wrong:
        raise DataError(
            f"the merged model does not read back as it was written: {len(wrong)} weights differ, the first is {wrong[0]}"
        )


def _same(weight: Tensor, other: Tensor | None) -> bool:
    return other is not None and weight.shape == other.shape and torch.equal(weight, other.to(weight.dtype))


def _target_dtype(base: BaseModel, dtype: Dtype) -> torch.dtype:
    with loading("a model", base.name_or_path):
        config = AutoConfig.from_pretrained(
            base.name_or_path, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    if getattr(config, "quantization_config", None) is not None:
        raise DataError(
            f"the base model {base.name_or_path!r} is stored quantised, nothing can be merged into it: name the one in full "
            "precision"
        )
    if dtype != "auto":
        return getattr(torch, dtype)
    return config.dtype or config.get_text_config().dtype or torch.float32


def _check_shared(model: PeftModel, layers: dict[str, LoraLayer]) -> None:
    """Refuse layers whose weights another module uses as well: an adapter acts on one of the two, a merged one on both."""
    mine = {id(layer.get_base_layer().weight): name for name, layer in layers.items()}
    own = {id(layer.get_base_layer()) for layer in layers.values()}
    for other, module in model.named_modules():
        name = mine.get(id(getattr(module, "weight", None)))
        if name is not None and id(module) not in own and module not in layers.values():
            raise ValueError(f"it adapts {_plain(name)}, which shares its weights with {_plain(other)}")


def _plain(name: str) -> str:
    """A layer's name before peft wrapped the model."""
    return name.removeprefix("base_model.model.")


@torch.no_grad()
def _merge_each(layers: dict[str, LoraLayer], silent: int, dtype: torch.dtype) -> None:
    """Merge layer by layer, comparing each with what it was.

    Args:
        silent: number of layers of which the adapter holds no update, such as those behind the last one that a model uses.

    Raises:
        ValueError: more layers than that stay as they were, or all do, or a change is lost in this dtype.
    """
    unmoved, lost = [], []
    for name, layer in layers.items():
        before = layer.get_base_layer().weight.detach().clone()
        layer.merge(safe_merge=True)
        after = layer.get_base_layer().weight
        if torch.equal(before, after):
            unmoved.append(name)
        elif torch.equal(before.to(dtype), after.to(dtype)):
            lost.append(name)
    if len(unmoved) > silent:
        raise ValueError(
            f"{len(unmoved)} of {len(layers)} layers are as before, the first is {_plain(unmoved[0])}"
        )
    if len(unmoved) == len(layers):
        raise ValueError("all its updates are zero: it was never trained")
    if lost:
        raise ValueError(f"the updates of {len(lost)} layers are too small for {dtype}: merge in float32")


@contextmanager
def _about(folder: str, base: BaseModel) -> Iterator[None]:
    """What goes wrong inside is about this adapter on this base."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        try:
            yield
        except DataError:
            raise
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            cause = " ".join(str(error).split())
            cause = cause if len(cause) < 300 else f"{cause[:297]}..."
            raise DataError(
                f"the adapter at {folder} cannot be merged into {base.name_or_path}: {cause}"
            ) from error
