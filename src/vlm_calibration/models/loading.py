"""Loading a vision-language model by name or folder, in full precision or with its language model quantised."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from vlm_calibration import hub
from vlm_calibration.models.base import BaseModel, Dtype, Quantization
from vlm_calibration.models.parts import part_of
from vlm_calibration.settings import digest


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


SPANS, SPAN = 16, 1 << 20
UNSTABLE = ("_name_or_path", "_commit_hash", "transformers_version")
"""Keys of a model's configuration that say where it comes from and not what it is."""


def weights_digest(base: BaseModel) -> str | None:
    """What tells a model from any other wherever its files lie: a digest of its configuration and weights.

    Of each file of weights the length and 16 spans of 1 MiB, evenly spread, are read, so small models wholly.

    Returns:
        32 hexadecimal digits, or None if the model is not, or not wholly, on this machine.
    """
    folder = _local_folder(base)
    weights = _weight_files(folder) if folder is not None else None
    if folder is None or weights is None or not (folder / "config.json").is_file():
        return None
    files = [folder / "config.json", *weights]
    return _model_digest(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


def _local_folder(base: BaseModel) -> Path | None:
    """The model's folder: its own, or that in the Hub's cache."""
    if Path(base.name_or_path).is_dir():
        return Path(base.name_or_path)
    try:
        config = try_to_load_from_cache(base.name_or_path, "config.json", revision=base.revision)
    except HFValidationError:
        return None  # a folder that does not exist, which loading it says
    return Path(config).parent if isinstance(config, str) else None


def _weight_files(folder: Path) -> list[Path] | None:
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        index = folder / f"{name}.index.json"
        names = {name}
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if all((folder / n).is_file() for n in names):
            return [folder / n for n in sorted(names)]
    return None


@lru_cache(maxsize=8)
def _model_digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of a configuration and files of weights, each with its size and date, which keep an old digest from being given."""
    (config, _, _), *weights = files
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key not in UNSTABLE}
    parts: list[Iterable[str | bytes]] = [[json.dumps(settings, sort_keys=True)]]
    for path, size, _ in weights:
        parts += [[f"{size}\n"], _spans(path, size)]
    return digest(chain.from_iterable(parts))


def _spans(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        if size <= SPANS * SPAN:
            yield file.read()
            return
        for i in range(SPANS):
            file.seek(i * (size - SPAN) // (SPANS - 1))
            yield file.read(SPAN)


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
