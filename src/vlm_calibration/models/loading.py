"""Load a vision-language model by name or folder, in full precision or with a quantised language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from vlm_calibration import hub
from vlm_calibration.models.adapters import layer_parts
from vlm_calibration.models.base import FLEX, THRESHOLDS, BaseModel
from vlm_calibration.records import DataError
from vlm_calibration.settings import digest, file_digest


def load_base(base: BaseModel, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load the model in eval mode; it generates greedily, whatever its `generation_config.json` says. A DataError if it cannot be loaded.

    A quantised model is loaded onto the device and must not be moved later; others are loaded onto the CPU.
    """
    flex = base.attn_implementation == FLEX
    if flex and torch.device(device).type in ("cpu", "mps"):
        raise DataError(
            f"attn_implementation: {FLEX} needs a GPU, but the model runs on {str(device)!r}, where FlexAttention has no backward "
            "pass: leave it out"
        )
    settings: dict[str, Any] = {
        "dtype": base.dtype if base.dtype == "auto" else getattr(torch, base.dtype),
        "attn_implementation": None if flex else base.attn_implementation,
    }
    with hub.loading("a model", base.name_or_path):
        if base.quantization != "none":
            settings |= {"quantization_config": _quantization(base), "device_map": {"": device}}
        model = AutoModelForImageTextToText.from_pretrained(
            base.name_or_path, revision=base.revision, trust_remote_code=base.trust_remote_code, **settings
        )
    # Settings of the checkpoint such as `repetition_penalty` would change what is generated, but not the scores of the same tokens.
    config = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
        num_beams=1,
    )
    if flex:
        use_in_language_model(model, FLEX)
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in eval mode, after which their gradients are wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def use_in_language_model(model: Any, attention: str) -> None:
    """Set the attention kernel of the language model; the tower keeps its own, which may not support FlexAttention."""
    model.get_decoder().config._attn_implementation = attention


def load_for_training(base: BaseModel, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load the model for training an adapter; peft prepares a quantised one (all other weights in float32)."""
    model = load_base(base, device)
    if base.quantization == "none":
        return model
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def model_config(base: BaseModel) -> Any:
    """The model's configuration; raises DataError if the model does not exist."""
    with hub.loading("a model", base.name_or_path):
        return AutoConfig.from_pretrained(
            base.name_or_path, revision=base.revision, trust_remote_code=base.trust_remote_code
        )


def empty_vlm(base: BaseModel) -> PreTrainedModel:
    """The model with meta tensors, which take no memory; raises DataError if the model does not exist."""
    config = model_config(base)
    with hub.loading("a model", base.name_or_path), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=base.trust_remote_code)


SPANS, SPAN = 16, 1 << 20
BESIDE_WEIGHTS = (".json", ".jinja", ".txt", ".model", ".py")
"""Suffixes of the files of processor, generation settings and code in a model's folder."""


def weights_digest(base: BaseModel) -> str | None:
    """A digest of a model's configuration and weights, independent of name and location.

    Of each weights file it covers the size and 16 evenly spread spans of 1 MiB, or the full content if smaller. None if files of the
    model are missing on this machine.
    """
    folder = local_folder(base)
    weights = weight_files(folder) if folder is not None else None
    if folder is None or weights is None or not (folder / "config.json").is_file():
        return None
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    origin = ("_name_or_path", "_commit_hash", "transformers_version")
    kept = {key: value for key, value in settings.items() if key not in origin}
    parts: list[str | bytes] = [json.dumps(kept, sort_keys=True)]
    for path in weights:
        size = path.stat().st_size
        is_small = size <= SPANS * SPAN
        parts.append(f"{size}\n")
        with path.open("rb") as file:
            for i in range(1 if is_small else SPANS):
                file.seek(i * (size - SPAN) // (SPANS - 1))
                parts.append(file.read(None if is_small else SPAN))
    return digest(parts)


def model_identity(name_or_path: str, revision: str | None = None) -> str | None:
    """What identifies the content of a model with its processor: of a folder a digest, of a name on the Hub the commit.

    None if the model is not on this machine.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        cached = local_folder(BaseModel(name_or_path, revision=revision))
        return cached.name if cached else None
    # A decision rule is chosen on the model's answers and changes none of them.
    files = [
        f"{path.name} {file_digest(path)}\n"
        for path in sorted(folder.iterdir())
        if path.suffix in BESIDE_WEIGHTS and path.is_file() and path.name not in ("config.json", THRESHOLDS)
    ]
    return digest([f"{weights_digest(BaseModel(name_or_path))}\n", *files])


def local_folder(base: BaseModel) -> Path | None:
    """The model's folder, on disk or in the Hub's cache; None if there is none."""
    if Path(base.name_or_path).is_dir():
        return Path(base.name_or_path)
    try:
        config = try_to_load_from_cache(base.name_or_path, "config.json", revision=base.revision)
    except HFValidationError:
        return None  # the folder does not exist; loading reports it
    return Path(config).parent if isinstance(config, str) else None


def weight_files(folder: Path) -> list[Path] | None:
    """The weights files in a model's folder, sorted by name; None if one that its index names is missing, or all are."""
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        index = folder / f"{name}.index.json"
        names = {name}
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if all((folder / n).is_file() for n in names):
            return [folder / n for n in sorted(names)]
    return None


def language_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Full name -> linear layer of the language model; quantisation replaces these."""
    return {name: model.get_submodule(name) for name, p in layer_parts(model).items() if p == "language"}


def why_not_nf4(model: PreTrainedModel) -> str | None:
    """Why the language model cannot be quantised to nf4, a layer whose number of inputs is no multiple of 64; else None."""
    for name, layer in language_layers(model).items():
        if layer.in_features % 64:
            return f"nf4 needs layers with a multiple of 64 inputs, {name} has {layer.in_features}"
    return None


def _quantization(base: BaseModel) -> BitsAndBytesConfig:
    model = empty_vlm(base)
    if base.quantization == "nf4" and (reason := why_not_nf4(model)):
        raise DataError(f"{base.name_or_path}: {reason}")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return BitsAndBytesConfig(
        load_in_8bit=base.quantization == "int8",
        load_in_4bit=base.quantization == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if base.dtype == "auto" else getattr(torch, base.dtype),
        llm_int8_skip_modules=sorted(linear - language_layers(model).keys()),
    )
