"""Merge an adapter into its base model, write it as transformers writes the base, and verify the result: merging can fail silently."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_utils import load_state_dict

from vlm_calibration.files import first_line, write_json
from vlm_calibration.hub import shorten_message
from vlm_calibration.models.adapters import load_adapters, unwrapped_name
from vlm_calibration.models.base import BaseModel, Dtype, read_object
from vlm_calibration.models.loading import load_base, local_folder, model_config, weight_files
from vlm_calibration.records import DataError


def merge_adapter(
    folder: str, base: BaseModel, dtype: Dtype = "auto"
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Merge a LoRA adapter into its base model in float32; takes 4 bytes of CPU memory per parameter.

    Returns the merged model in eval mode, and the names of the adapter's layers. A DataError if the base cannot be loaded or is stored
    quantised, the adapter does not fit it, or an update of it changes nothing.

    Args:
        folder: the adapter, as peft saves it.
        base: its base model, which is loaded in full precision whatever its dtype, quantisation and attention kernel.
        dtype: of the merged weights; "auto": that of the base's checkpoint.
    """
    config = model_config(base)
    if getattr(config, "quantization_config", None) is not None:
        raise DataError(
            f"the base model {base.name_or_path!r} is stored quantised, and nothing can be merged into it: use the model in "
            "full precision"
        )
    target = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    model = load_base(replace(base, dtype="float32", quantization="none", attn_implementation=None))
    wrapped = load_adapters(model, {"default": folder})
    assert isinstance(wrapped, PeftModel)
    try:
        lora = wrapped.peft_config["default"]
        if lora.peft_type != PeftType.LORA:
            raise ValueError("it is not a LoRA adapter")
        if lora.bias != "none" or lora.lora_bias:
            raise ValueError("it has trained biases, and only weights are merged: train it with `bias: none`")
        layers = {unwrapped_name(n): m for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)}
        # An adapter changes one of two modules with tied weights, merging changes both.
        by_weight = {id(layer.get_base_layer().weight): name for name, layer in layers.items()}
        adapted = {id(module) for layer in layers.values() for module in (layer, layer.get_base_layer())}
        for name, module in wrapped.named_modules():
            tied = by_weight.get(id(getattr(module, "weight", None)))
            if tied is not None and id(module) not in adapted:
                raise ValueError(f"it adapts {tied}, which shares its weights with {unwrapped_name(name)}")
        _merge_layers(layers, target)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            merged = wrapped.merge_and_unload().eval()
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(
            f"the adapter at {folder} cannot be merged into {base.name_or_path}: {shorten_message(error)}"
        ) from error
    return merged.to(target), tuple(layers)


@torch.no_grad()
def _merge_layers(layers: dict[str, LoraLayer], dtype: torch.dtype) -> None:
    """Merge each layer; raise a ValueError if an update does not change its weight in the dtype, or there is none."""
    # Of each layer with an update; one behind the last that a model uses has none.
    is_changed: dict[str, bool] = {}
    for name, layer in layers.items():
        before = layer.get_base_layer().weight.detach().clone()
        updates = [*layer.lora_B.parameters(), *layer.lora_embedding_B.parameters()]
        layer.merge(safe_merge=True)
        if any(bool(update.any()) for update in updates):
            is_changed[name] = not torch.equal(before.to(dtype), layer.get_base_layer().weight.to(dtype))
    if not is_changed:
        raise ValueError("all its updates are zero: it was never trained")
    if lost := [name for name, changed in is_changed.items() if not changed]:
        raise ValueError(
            f"the updates of {len(lost)} of {len(layers)} layers change nothing in {dtype}, the first is {lost[0]}: merge in float32"
        )


def save_merged(model: PreTrainedModel, base: BaseModel, folder: Path) -> None:
    """Write a merged model under the tensor names and with the configuration of its base, which vLLM knows; check that it can be read.

    A DataError if the model cannot be written, has weights that the base's checkpoint lacks, or other weights are read back.
    """
    source = local_folder(base)
    assert source is not None, "the base has been loaded"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        # transformers has written its own form of the configuration.
        shutil.copyfile(source / "config.json", folder / "config.json")
        if (model_config(base).dtype or torch.float32) != model.dtype:
            config = {"dtype": "", **read_object(folder / "config.json")}
            write_json(folder / "config.json", _with_dtype(config, str(model.dtype).removeprefix("torch.")))
        reloaded, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=model.dtype, trust_remote_code=base.trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"cannot write the merged model: {first_line(error)}") from error
    if renamed := sorted(_shapes(folder) - _shapes(source)):
        raise DataError(
            f"the merged model has {len(renamed)} weights that the checkpoint of {base.name_or_path} does not have by this name "
            f"and shape, the first is {renamed[0][0]}"
        )
    state = reloaded.state_dict()
    different = [*info["missing_keys"], *map(str, info["mismatched_keys"])]
    for name, weight in model.state_dict().items():
        if name not in state or not torch.equal(weight, state[name].to(weight.dtype)):
            different.append(name)
    if different:
        raise DataError(
            f"the merged model was not read back as written: {len(different)} weights differ, the first is {different[0]}"
        )


def _shapes(folder: Path) -> set[tuple[str, torch.Size]]:
    """Name and shape of each tensor of a checkpoint."""
    files = [load_state_dict(path, map_location="meta") for path in weight_files(folder) or ()]
    return {(name, tensor.shape) for tensors in files for name, tensor in tensors.items()}


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with `dtype` wherever it, or a configuration in it, names one."""
    changed = {key: _with_dtype(value, dtype) for key, value in config.items() if isinstance(value, dict)}
    return {**config, **changed, **{key: dtype for key in ("dtype", "torch_dtype") if key in config}}
