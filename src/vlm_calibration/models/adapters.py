"""LoRA adapters: where they go, how they are attached, and how several of them share one base model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from vlm_calibration.models.base import CONFIG, find_adapter, read_object
from vlm_calibration.models.parts import ModelPart, part_of
from vlm_calibration.records import DataError


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA adapter (Hu et al., arXiv 2106.09685), named as peft names it.

    Args:
        r: rank. alpha: scale; the update is multiplied by alpha / r. dropout: on the adapter's input, in [0, 1).
        parts: which parts of the model get one: the language model, the vision tower, the projector between them.
        use_rslora: scale by alpha / sqrt(r) instead (arXiv 2312.03732).
        use_dora: learn magnitude and direction apart (arXiv 2402.09353).
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    parts: list[ModelPart] = field(default_factory=lambda: ["language"])
    use_rslora: bool = False
    use_dora: bool = False


def attach_lora(model: PreTrainedModel, settings: LoraSettings, adapter_name: str = "default") -> PeftModel:
    """Freeze the model and add a LoRA adapter to the linear layers of the wanted parts.

    Raises:
        DataError: the model has no linear layer in one of the parts.
    """
    found = part_of(model)
    for part in settings.parts:
        if part not in found.values():
            raise DataError(f"lora.parts: {type(model).__name__} has no linear layer in its {part}")
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=[name for name, part in found.items() if part in settings.parts],
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, adapter_name=adapter_name)


def load_adapters(model: PreTrainedModel, adapters: dict[str, str]) -> PreTrainedModel | PeftModel:
    """Load adapters into one model, without a copy of the base; the model itself if there are none.

    Args:
        adapters: name -> adapter, as for `find_adapter`.

    Raises:
        DataError: there is no such adapter, or it does not fit the model.
    """
    wrapped: PeftModel | None = None
    for name, adapter in adapters.items():
        folder = find_adapter(adapter)
        with _fitting(folder, model.name_or_path):
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
            else:
                wrapped.load_adapter(str(folder), adapter_name=name)
            _check_whole(wrapped, name, folder)
    return model if wrapped is None else wrapped


@contextmanager
def _fitting(folder: Path, base: str) -> Iterator[None]:
    """What goes wrong inside is that an adapter does not fit a base model."""
    try:
        with warnings.catch_warnings():
            # Of weights that the model expects and the adapter lacks peft only warns.
            warnings.filterwarnings("error", message="(?s).*Found missing adapter keys")
            yield
    except (OSError, ValueError, TypeError, RuntimeError, UserWarning, SafetensorError) as error:
        trained = read_object(folder / CONFIG).get("base_model_name_or_path")
        raise DataError(
            f"the adapter at {folder} does not fit the base model {base}: {_misfit(error)}; it names {trained} as its "
            "base model: give that one, or an adapter of this one"
        ) from error


_SIZE = re.compile(r"size mismatch for (\S+): .*?Size\((\[.*?\])\).*?Size\((\[.*?\])\)", re.DOTALL)


def _misfit(error: BaseException) -> str:
    """What peft says, short: of weights that differ in size, or are missing, the first."""
    if found := _SIZE.search(str(error)):
        return f"{_layer_of(found[1])} has a weight of size {found[2]} in the adapter and {found[3]} in the model"
    text = " ".join(str(error).split())
    if "Found missing adapter keys" in text:
        missing = list(dict.fromkeys(_layer_of(key) for key in re.findall(r"'([^']+\.lora_[^']+)'", text)))
        return f"its file lacks the weights of {len(missing)} layers that its configuration names, the first is {missing[0]}"
    return text if len(text) < 300 else f"{text[:297]}..."


def _check_whole(model: PeftModel, name: str, folder: Path) -> None:
    """Check that every LoRA layer in the adapter's file has a place in the model: peft passes over those that have none."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return
    with safe_open(file, framework="pt") as weights:
        held = [key for key in weights.keys() if ".lora_A." in key]  # noqa: SIM118
    placed = [layer for layer in _tuner_layers(model) if name in getattr(layer, "lora_A", ())]
    if len(placed) < len(held):
        raise ValueError(f"it holds {len(held)} layers, of which the model has {len(placed)}")


@contextmanager
def using_adapter(model: PreTrainedModel | PeftModel, name: str | None) -> Iterator[None]:
    """Run with this adapter, or with the base model alone (None); afterwards the one before is active again.

    What is trained stays as it was: peft would unfreeze the adapter that it switches to.
    """
    if not isinstance(model, PeftModel):
        if name is not None:
            raise ValueError(f"the model has no adapter {name!r}")
        yield
        return
    trained = [(p, p.requires_grad) for p in model.parameters()]
    before = model.active_adapter
    disabled = any(layer.disable_adapters for layer in _tuner_layers(model))
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


def _tuner_layers(model: PeftModel) -> Iterator[BaseTunerLayer]:
    return (m for m in model.modules() if isinstance(m, BaseTunerLayer))


REFERENCE = "reference"
"""Name of the frozen adapter that a preference loss compares with."""


def continue_adapter(
    model: PreTrainedModel, folder: str, parts: Sequence[ModelPart] | None = None, reference: bool = True
) -> PeftModel:
    """Go on training a saved adapter, beside a frozen copy of it as the adapter `REFERENCE`.

    Args:
        folder: the saved adapter, as for `find_adapter`.
        parts: train only its layers in these parts of the model; None: all of them.
        reference: whether to load the copy.

    Raises:
        DataError: there is no such adapter, it does not fit the model, or it has no layer in the wanted parts.
    """
    where = part_of(model)
    folder = str(find_adapter(folder))
    wrapped = load_adapters(model, {"default": folder})
    assert isinstance(wrapped, PeftModel)
    if reference:
        wrapped.load_adapter(folder, adapter_name=REFERENCE)
        for layer in _tuner_layers(wrapped):
            layer.lora_dropout[REFERENCE] = nn.Identity()  # what is compared with is not drawn at random
    wrapped.set_adapter("default")
    wanted = {name for name, part in where.items() if parts is None or part in parts}
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(".default." in name and _layer_of(name) in wanted)
    if not any(p.requires_grad for p in wrapped.parameters()):
        raise DataError(f"the adapter at {folder} has no layer in {', '.join(parts or ())}")
    return wrapped


def _layer_of(parameter: str) -> str:
    """The linear layer that an adapter's parameter belongs to, by its name before peft wrapped the model."""
    return parameter.removeprefix("base_model.model.").split(".lora_", 1)[0]
