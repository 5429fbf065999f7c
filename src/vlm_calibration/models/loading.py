"""Loading a vision-language model by name or folder, in full precision or with its language model quantised."""

from __future__ import annotations

from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from vlm_calibration import hub
from vlm_calibration.models.base import BaseModel, Dtype, Quantization
from vlm_calibration.models.parts import part_of


def load_vlm(
    name_or_path: str,
    quantization: Quantization = "none",
    dtype: Dtype = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a model onto the CPU, in eval mode; the settings are those of `BaseModel`.

    Raises:
        DataError: there is no such model, or it cannot be loaded in this way.
    """
    return load_base(
        BaseModel(name_or_path, dtype, quantization, attn_implementation, revision, trust_remote_code)
    )


def load_base(base: BaseModel, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load the model, in eval mode.

    Args:
        device: where a quantised model is loaded to, which must not be moved later. Others are loaded onto the CPU.

    Raises:
        DataError: there is no such model, or it cannot be loaded in this way.
    """
    settings: dict[str, Any] = {
        "dtype": base.dtype if base.dtype == "auto" else getattr(torch, base.dtype),
        "attn_implementation": base.attn_implementation,
    }
    with hub.loading("a model", base.name_or_path):
        if base.quantization != "none":
            settings |= {"quantization_config": _quantization(base), "device_map": {"": device}}
        model = AutoModelForImageTextToText.from_pretrained(
            base.name_or_path,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            **settings,
        )
    if base.quantization == "nf4":
        _keep_layout(model)
    return model


def load_for_training(base: BaseModel, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load the model to train an adapter on: a quantised one prepared by peft (what is not quantised in float32)."""
    model = load_base(base, device)
    if base.quantization == "none":
        return model
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def empty_vlm(base: BaseModel) -> PreTrainedModel:
    """The architecture alone: the model with parameters that have shapes but no values, and take no memory.

    Raises:
        DataError: there is no such model.
    """
    with hub.loading("a model", base.name_or_path):
        config = AutoConfig.from_pretrained(
            base.name_or_path, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=base.trust_remote_code)


def quantised_layers(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers that quantisation replaces: those of the language model."""
    return [name for name, part in part_of(model).items() if part == "language"]


def _quantization(base: BaseModel) -> BitsAndBytesConfig:
    model = empty_vlm(base)
    wanted = set(quantised_layers(model))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if base.quantization == "nf4":
        _check_blocks(model, wanted)
    return BitsAndBytesConfig(
        load_in_8bit=base.quantization == "int8",
        load_in_4bit=base.quantization == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if base.dtype == "auto" else getattr(torch, base.dtype),
        llm_int8_skip_modules=[name for name in linear if name not in wanted],
    )


def _check_blocks(model: PreTrainedModel, wanted: set[str]) -> None:
    for name, module in model.named_modules():
        if name in wanted and module.in_features % 64:
            raise ValueError(f"nf4 needs layers of a multiple of 64 inputs, {name} has {module.in_features}")


def _keep_layout(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights.

    On CPUs with AVX512-BF16 it does so in the first pass in eval mode, and later gradients through them are wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
