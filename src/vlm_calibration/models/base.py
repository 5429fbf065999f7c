"""Which base model and which adapter are meant: by name, by folder, or by what an adapter says. Nothing is loaded here.

Neither torch nor transformers is imported, so that the help of a command need not wait for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vlm_calibration.records import DataError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "nf4"]

ADAPTER = "adapter"
"""The adapter's folder within a run directory."""
CONFIG, FACTS = "adapter_config.json", "calibration.json"
"""peft's description of an adapter, and what its model card is made of."""


@dataclass(frozen=True)
class BaseModel:
    """Which base model to load, and how.

    Args:
        name_or_path: name on the Hub, or a folder that `from_pretrained` reads.
        dtype: of the weights, and of the arithmetic on quantised ones; "auto" keeps what the checkpoint says.
        quantization: of the language model's linear layers, through bitsandbytes: "int8" (LLM.int8(), arXiv 2208.07339)
            or "nf4" with double quantisation (QLoRA, arXiv 2305.14314). Tower, projector and output head keep `dtype`.
        attn_implementation: attention kernel, e.g. "sdpa", "eager" or "flash_attention_2"; None: transformers' choice.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run modelling code that comes with the checkpoint.
    """

    name_or_path: str
    dtype: Dtype = "auto"
    quantization: Quantization = "none"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


def find_adapter(run: str | Path) -> Path:
    """The folder of an adapter: this one, `adapter` in it, or what the Hub has under this name.

    Args:
        run: a run directory, the folder of an adapter, or a name on the Hub, `owner/name` or `owner/name@revision`.

    Raises:
        DataError: none of them holds an adapter.
    """
    for folder in (Path(run), Path(run) / ADAPTER):
        if (folder / CONFIG).is_file():
            return folder
    missing = f"no adapter at {run} (expected {CONFIG} there or in its folder {ADAPTER!r}): train one first"
    name, _, revision = str(run).partition("@")
    from vlm_calibration.hub import download, is_hub_name

    if Path(run).exists() or not is_hub_name(name):
        raise DataError(missing)
    try:
        folder = download("an adapter", name, revision or None)
    except DataError as error:
        raise DataError(f"{missing}, or give its name on the Hub: {error}") from error
    if not (folder / CONFIG).is_file():
        raise DataError(f"no adapter at {run}: the repository on the Hub has no {CONFIG}")
    return folder


def base_of_adapter(adapter: str | Path) -> BaseModel:
    """The base model that an adapter names, of the dtype and quantisation that it was trained with.

    Without a model card of ours, the dtype is that of the base's checkpoint.

    Args:
        adapter: as for `find_adapter`.

    Raises:
        DataError: there is no adapter, or it names no base model.
    """
    folder = find_adapter(adapter)
    config = read_object(folder / CONFIG)
    name = config.get("base_model_name_or_path")
    if not name:
        raise DataError(f"{folder / CONFIG}: it names no base model: give one")
    card = read_object(folder / FACTS) if (folder / FACTS).is_file() else {}
    found = {"dtype": card.get("dtype", "auto"), "quantization": card.get("quantization", "none")}
    for (key, value), known in zip(found.items(), (Dtype, Quantization), strict=True):
        if value not in get_args(known):
            raise DataError(
                f"{folder / FACTS}: {key} must be one of {', '.join(get_args(known))}, found {value!r}"
            )
    return BaseModel(name, revision=config.get("revision"), **found)


def base_of_adapters(adapters: Mapping[str, str]) -> BaseModel:
    """The one base model of all these adapters.

    Args:
        adapters: name -> adapter, as for `find_adapter`.

    Raises:
        DataError: there is no adapter, or two of them name different base models, or different dtypes or quantisations.
    """
    if not adapters:
        raise DataError(
            "no base model: there is no adapter that names one; give model.init_args.base.name_or_path, or adapters"
        )
    named = {name: base_of_adapter(adapter) for name, adapter in adapters.items()}
    # Without a card an adapter does not say in which dtype it was trained.
    first = next((name for name, base in named.items() if base.dtype != "auto"), next(iter(named)))
    for name, other in named.items():
        if _differ(named[first], other):
            raise DataError(
                f"the adapters {first!r} and {name!r} are of different base models: {_shown(named[first])} and "
                f"{_shown(other)}; evaluate them apart, or name the one for both with model.init_args.base.name_or_path"
            )
    return named[first]


def _differ(base: BaseModel, other: BaseModel) -> bool:
    places = [
        str(folder.resolve()) if (folder := Path(b.name_or_path)).is_dir() else b.name_or_path
        for b in (base, other)
    ]
    return (
        places[0] != places[1]
        or base.revision != other.revision
        or base.quantization != other.quantization
        or (base.dtype != other.dtype and "auto" not in (base.dtype, other.dtype))
    )


def _shown(base: BaseModel) -> str:
    revision = f"@{base.revision}" if base.revision else ""
    kind = "" if base.quantization == "none" else f", {base.quantization}"
    return f"{base.name_or_path}{revision} ({base.dtype}{kind})"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DataError: it cannot be read, or is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object")
    return content
