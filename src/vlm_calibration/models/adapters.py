"""LoRA adapters: attach, load, switch and continue training them on one shared base model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedModel

from vlm_calibration.hub import shorten_message
from vlm_calibration.models.base import CONFIG, BaseModel, find_adapter, read_object
from vlm_calibration.records import DataError

ModelPart = Literal["language", "tower", "projector"]
REFERENCE = "reference"
"""Name of the frozen adapter that is the reference model of a preference loss."""


@dataclass(frozen=True)
class LoraSettings:
    """Settings of a LoRA adapter (Hu et al., arXiv 2106.09685), with peft's names.

    Args:
        r: rank.
        alpha: scale; the update is multiplied by alpha / r.
        dropout: on the adapter's input, in [0, 1). Stage 2 trains without: it compares the adapter with a reference.
        parts: parts of the model with an adapter: the language model, the vision tower, the projector between them.
        use_rslora: scale by alpha / sqrt(r) instead (arXiv 2312.03732).
        use_dora: learn magnitude and direction separately (arXiv 2402.09353).
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    parts: list[ModelPart] = field(default_factory=lambda: ["language"])
    use_rslora: bool = False
    use_dora: bool = False


def layer_parts(model: PreTrainedModel) -> dict[str, ModelPart]:
    """Full name of each linear layer, except for the output head -> the part of the model that it belongs to."""
    inside = {id(module) for module in model.get_decoder().modules()}
    parts: dict[str, ModelPart] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is model.get_output_embeddings():
            continue
        if id(module) in inside:
            parts[name] = "language"
        # transformers' names for it
        elif any(word in name for word in ("projector", "connector", "merger", "aligner")):
            parts[name] = "projector"
        else:
            parts[name] = "tower"
    return parts


def attach_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Freeze the model and add a LoRA adapter to the linear layers of `settings.parts`; a DataError if one has none."""
    parts = layer_parts(model)
    for part in settings.parts:
        if part not in parts.values():
            raise DataError(f"lora.parts: {type(model).__name__} has no linear layer in its {part}")
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=[name for name, part in parts.items() if part in settings.parts],
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def adapted_parts(model: PeftModel) -> list[ModelPart]:
    """The parts of the model in which linear layers have an adapter, sorted by name."""
    parts = layer_parts(model.get_base_model())
    return sorted({part for name, part in parts.items() if name.endswith(".base_layer")})


def load_adapters(model: PreTrainedModel, adapters: dict[str, str]) -> PreTrainedModel | PeftModel:
    """Load adapters (name -> location, as for `find_adapter`); a DataError if one does not exist, or does not fit the model."""
    wrapped, base = model, model.name_or_path
    for name, adapter in adapters.items():
        folder = find_adapter(adapter)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="(?s).*Found missing adapter keys")
                if isinstance(wrapped, PeftModel):
                    wrapped.load_adapter(str(folder), adapter_name=name)
                else:
                    wrapped = PeftModel.from_pretrained(wrapped, str(folder), adapter_name=name)
            # peft leaves out layers that only the model or only the file has.
            weights = load_peft_weights(str(folder), device="cpu")
            saved = {unwrapped_name(n) for n in weights if ".lora_A." in n}
            loaded = {unwrapped_name(n) for n, _ in wrapped.named_parameters() if f".lora_A.{name}." in n}
            sides = (("its file", "the model", loaded - saved), ("the model", "its file", saved - loaded))
            for one, other, lacking in sides:
                if lacking:
                    raise ValueError(
                        f"{one} lacks {len(lacking)} layers of {other}, the first is {min(lacking)}"
                    )
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            trained = read_object(folder / CONFIG).get("base_model_name_or_path")
            advice = f"its base model is {trained}: use that one, or an adapter of {base}"
            if trained and BaseModel(trained).name_or_path == base:
                advice = "its base model has this name, so one of the two has changed: use the former base model, or train again"
            raise DataError(
                f"the adapter at {folder} does not fit the base model {base}: {shorten_message(error)}; {advice}"
            ) from error
    return wrapped


@contextmanager
def using_adapter(model: PreTrainedModel | PeftModel, name: str | None) -> Iterator[None]:
    """Activate an adapter in the block, or the base model alone (None); restore the previous one and all `requires_grad` on exit."""
    if not isinstance(model, PeftModel):
        if name is not None:
            raise ValueError(f"the model has no adapter {name!r}")
        yield
        return
    trained = [(p, p.requires_grad) for p in model.parameters()]
    before = model.active_adapter
    disabled = any(m.disable_adapters for m in model.modules() if isinstance(m, BaseTunerLayer))
    try:
        if name is None:
            with model.disable_adapter():
                yield
        else:
            model.base_model.enable_adapter_layers()
            model.set_adapter(name, inference_mode=True)
            yield
    finally:
        model.set_adapter(before)
        if disabled:
            model.base_model.disable_adapter_layers()
        for parameter, flag in trained:
            parameter.requires_grad_(flag)


def continue_adapter(
    model: PreTrainedModel, folder: str, parts: Sequence[ModelPart] | None = None, reference: bool = True
) -> PeftModel:
    """Load a saved adapter, as `load_adapters`, for further training without dropout.

    Args:
        parts: parts of the model whose layers are trained; None: all that have an adapter. A DataError if none has one.
        reference: also load a frozen copy, as the adapter `REFERENCE`.
    """
    layers, names = layer_parts(model), ["default", REFERENCE] if reference else ["default"]
    wrapped = load_adapters(model, dict.fromkeys(names, folder))
    assert isinstance(wrapped, PeftModel)
    for layer in wrapped.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.lora_dropout = nn.ModuleDict({name: nn.Identity() for name in layer.lora_dropout})
    for config in wrapped.peft_config.values():
        config.lora_dropout = 0.0
    wrapped.set_adapter("default")
    trained = {name for name, part in layers.items() if parts is None or part in parts}
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(".default." in name and unwrapped_name(name) in trained)
    if not any(p.requires_grad for p in wrapped.parameters()):
        raise DataError(f"the adapter at {folder} has no layer in {', '.join(parts or ())}")
    return wrapped


def unwrapped_name(name: str) -> str:
    """The name in the base model of an adapted layer, from peft's name of it or of a parameter of its adapter."""
    return name.removeprefix("base_model.model.").split(".lora_", 1)[0]
