"""Merge an adapter into its base model, write it as the base's checkpoint is written, and verify the result.

Merging can fail silently: if the names in an adapter do not match the model, peft merges nothing and the result is the base
model. Therefore each layer is compared before and after, and the written model is read back.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vlm_calibration.files import first_line
from vlm_calibration.hub import shorten_message
from vlm_calibration.models.adapters import load_adapters, unwrapped_name
from vlm_calibration.models.base import BaseModel, Dtype
from vlm_calibration.models.checkpoint import (
    Checkpoint,
    Stored,
    copy_checkpoint,
    find_checkpoint,
    find_weights,
)
from vlm_calibration.models.loading import load_base, model_config
from vlm_calibration.records import DataError


class Merged(NamedTuple):
    """A model with a merged adapter.

    Attributes:
        model: the model in eval mode.
        layers: names of the layers that the adapter changed.
        weights: name of each weight that the adapter changed -> its tensor in the base's checkpoint.
        checkpoint: the base's files.
        dtype: of all floating-point weights; None: each has the one that the base's checkpoint has for it.
        trust_remote_code: whether the model runs code of its checkpoint.
    """

    model: PreTrainedModel
    layers: tuple[str, ...]
    weights: dict[str, Stored]
    checkpoint: Checkpoint
    dtype: torch.dtype | None
    trust_remote_code: bool


def merge_adapter(folder: str, base: BaseModel, dtype: Dtype = "auto") -> Merged:
    """Merge a LoRA adapter into its base model in float32; takes 4 bytes of CPU memory per parameter.

    Args:
        folder: the adapter, as peft saves it.
        base: its base model; dtype, quantisation and attention kernel are ignored. An adapter trained on a quantised base is merged into the
            base in full precision.
        dtype: of the merged weights; "auto": that of each weight in the base's checkpoint.

    Raises:
        DataError: the base cannot be loaded or is stored quantised, the adapter does not fit it, a changed weight is not stored as
            one tensor of the base's checkpoint, or merging did not change every layer for which the adapter has an update.
    """
    if getattr(model_config(base), "quantization_config", None) is not None:
        raise DataError(
            f"the base model {base.name_or_path!r} is stored quantised, and nothing can be merged into it: use the model in "
            "full precision"
        )
    target = None if dtype == "auto" else getattr(torch, dtype)
    model = load_base(replace(base, dtype="float32", quantization="none", attn_implementation=None))
    checkpoint = find_checkpoint(base)
    wrapped = load_adapters(model, {"default": folder})
    assert isinstance(wrapped, PeftModel)
    try:
        config = wrapped.peft_config["default"]
        if config.peft_type != PeftType.LORA:
            raise ValueError("it is not a LoRA adapter")
        if config.bias != "none" or config.lora_bias:
            raise ValueError("it has trained biases, and only weights are merged: train it with `bias: none`")
        layers = {unwrapped_name(n): m for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)}
        _check_tied_weights(wrapped, layers)
        changed = {f"{name}.weight": layer.get_base_layer().weight for name, layer in layers.items()}
        for name, module in wrapped.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                parameters = module.original_module.named_parameters()
                changed |= {unwrapped_name(f"{name}.{n}"): parameter for n, parameter in parameters}
        weights = find_weights(changed, checkpoint)
        dtypes = {name: target or stored.dtype for name, stored in weights.items()}
        _merge_layers(layers, dtypes)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            merged = wrapped.merge_and_unload().eval()
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(
            f"the adapter at {folder} cannot be merged into {base.name_or_path}: {shorten_message(error)}"
        ) from error
    for name, kind in dtypes.items():
        merged.get_parameter(name).data = merged.get_parameter(name).data.to(kind)
    merged = merged.to(reduce(torch.promote_types, dtypes.values()))
    return Merged(merged, tuple(layers), weights, checkpoint, target, base.trust_remote_code)


def _check_tied_weights(model: PeftModel, layers: dict[str, LoraLayer]) -> None:
    """Refuse layers with tied weights: an adapter changes one of the two modules, merging changes both."""
    by_weight = {id(layer.get_base_layer().weight): name for name, layer in layers.items()}
    adapted = {id(module) for layer in layers.values() for module in (layer, layer.get_base_layer())}
    for name, module in model.named_modules():
        tied = by_weight.get(id(getattr(module, "weight", None)))
        if tied is not None and id(module) not in adapted:
            raise ValueError(f"it adapts {tied}, which shares its weights with {unwrapped_name(name)}")


@torch.no_grad()
def _merge_layers(layers: dict[str, LoraLayer], dtypes: dict[str, torch.dtype]) -> None:
    """Merge each layer, by its name in the base model, and compare its weight before and after.

    `dtypes` are those in which the weights are written. A ValueError says that a layer with an update or all layers are unchanged, or
    that a change is lost in the dtype.
    """
    unchanged, stuck, lost = [], [], []
    for name, layer in layers.items():
        before, dtype = layer.get_base_layer().weight.detach().clone(), dtypes[f"{name}.weight"]
        # A layer behind the last one that a model uses has no update.
        updates = [*layer.lora_B.parameters(), *layer.lora_embedding_B.parameters()]
        layer.merge(safe_merge=True)
        after = layer.get_base_layer().weight
        if torch.equal(before, after):
            unchanged.append(name)
            stuck += [name] if any(bool(update.any()) for update in updates) else []
        elif torch.equal(before.to(dtype), after.to(dtype)):
            lost.append(name)
    if stuck:
        raise ValueError(f"{len(stuck)} of {len(layers)} layers are unchanged, the first is {stuck[0]}")
    if len(unchanged) == len(layers):
        raise ValueError("all its updates are zero: it was never trained")
    if lost:
        kind = dtypes[f"{lost[0]}.weight"]
        raise ValueError(f"the updates of {len(lost)} layers are too small for {kind}: merge in float32")


def save_merged(merged: Merged, folder: Path) -> None:
    """Write a copy of the base's checkpoint with the changed weights, and check that transformers reads the merged weights back.

    Names, shapes, files and configuration are the base's own, except for `generation_config.json`, which asks for greedy decoding and
    no more. Tensors that the adapter does not change are equal byte for byte.

    Raises:
        DataError: the model cannot be written, or different weights are read back.
    """
    model = merged.model
    replaced = {stored.name: model.get_parameter(name) for name, stored in merged.weights.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        copy_checkpoint(merged.checkpoint, folder, replaced, merged.dtype, merged.trust_remote_code)
        model.generation_config.save_pretrained(folder)
        reloaded, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=model.dtype, trust_remote_code=merged.trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"cannot write the merged model: {first_line(error)}") from error
    state = reloaded.state_dict()
    # A checkpoint may have tensors that transformers leaves out.
    different = [*info["missing_keys"], *map(str, info["mismatched_keys"])]
    for name, weight in model.state_dict().items():
        read = state.get(name)
        if read is None or read.shape != weight.shape or not torch.equal(weight, read.to(weight.dtype)):
            different.append(name)
    if different:
        raise DataError(
            f"the merged model was not read back as written: {len(different)} weights differ, the first is {different[0]}"
        )
