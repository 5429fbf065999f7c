"""Locate base models and adapters without loading them; imports neither torch nor transformers, so that command help stays fast."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open

from vlm_calibration.files import read_json
from vlm_calibration.presets import DEMO
from vlm_calibration.records import DataError
from vlm_calibration.settings import digest, file_digest

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "nf4"]
FLEX = "flex_attention"

ADAPTER = "adapter"
"""The adapter's folder within a run directory."""
CONFIG, FACTS = "adapter_config.json", "calibration.json"
"""peft's configuration of an adapter, and the data of its model card."""
WEIGHTS = "adapter_model.safetensors"
THRESHOLDS = "thresholds.json"
"""The decision rule beside an adapter's or a merged model's weights."""
DEMO_MODEL = DEMO / "model"


@dataclass(frozen=True)
class BaseModel:
    """A base model and how to load it.

    Args:
        name_or_path: name on the Hub, or a folder, which becomes absolute: what is written about the model is read from other working
            folders. The demo's model in a folder that does not exist, of another checkout or installation, is this package's.
        dtype: of the weights, and of the arithmetic on quantised weights; "auto": the checkpoint's dtype.
        quantization: of the language model's linear layers, with bitsandbytes: "int8" (LLM.int8(), arXiv 2208.07339) or
            "nf4" with double quantisation (QLoRA, arXiv 2305.14314). Tower, projector and output head keep `dtype`.
        attn_implementation: attention kernel, e.g. "sdpa", "eager" or "flash_attention_2"; None: transformers' default. With
            "flex_attention" the language model uses FlexAttention, on GPUs, and candidates that share a row take no dense mask.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run modelling code of the checkpoint.
    """

    name_or_path: str
    dtype: Dtype = "auto"
    quantization: Quantization = "none"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        folder = Path(self.name_or_path)
        if folder.is_dir():
            object.__setattr__(self, "name_or_path", str(folder.absolute()))
        elif folder.parts[-3:] == DEMO_MODEL.parts[-3:]:
            object.__setattr__(self, "name_or_path", str(DEMO_MODEL))


def find_adapter(run: str | Path) -> Path:
    """The folder of an adapter: that of a run, of the adapter itself, or downloaded from the Hub, `owner/name[@revision]`.

    A DataError if there is none, or the file of its weights is truncated.
    """
    missing = f"no adapter at {run} (expected {CONFIG} there or in its folder {ADAPTER!r}): train one first"
    folders = [Path(run), Path(run) / ADAPTER]
    if not Path(run).exists():
        from huggingface_hub import snapshot_download

        from vlm_calibration.hub import is_hub_name, loading

        name, _, revision = str(run).partition("@")
        if is_hub_name(name):
            try:
                with loading("an adapter", name):
                    folders = [Path(snapshot_download(name, revision=revision or None))]
            except DataError as error:
                raise DataError(f"{missing}, or give its name on the Hub: {error}") from error
            missing = f"no adapter at {run}: the repository on the Hub has no {CONFIG}"
    folder = next((folder for folder in folders if (folder / CONFIG).is_file()), None)
    if folder is None:
        raise DataError(missing)
    weights = folder / WEIGHTS
    try:
        if weights.is_file():  # older adapters have another file
            with safe_open(weights, framework="np"):
                pass
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{weights}: damaged or truncated ({error}): copy the adapter again, or train it again"
        ) from error
    return folder


def adapter_digest(folder: Path, *left_out: str) -> str:
    """The digest of the files that peft reads from an adapter's folder, without those that are `left_out`."""
    files = [f for f in sorted(folder.glob("adapter_*")) if f.is_file() and f.name not in left_out]
    return digest([json.dumps({f.name: file_digest(f) for f in files})])


def adapter_weights_digest(folder: Path) -> str:
    """The digest of an adapter's weights, whatever base model its configuration names."""
    return adapter_digest(folder, CONFIG)


def base_of_adapter(adapter: str | Path) -> BaseModel:
    """The base model of an adapter (as for `find_adapter`), with the dtype and quantisation of its training if its card has them.

    A DataError if there is no adapter, or its configuration names no base model.
    """
    folder = find_adapter(adapter)
    config = read_object(folder / CONFIG)
    name = config.get("base_model_name_or_path")
    if not name:
        raise DataError(f"{folder / CONFIG}: the configuration names no base model: give one")
    card = read_object(folder / FACTS) if (folder / FACTS).is_file() else {}
    settings = {key: card[key] for key in ("dtype", "quantization") if key in card}
    base = BaseModel(name, revision=config.get("revision"), **settings)
    for key, choices in {"dtype": get_args(Dtype), "quantization": get_args(Quantization)}.items():
        if (value := getattr(base, key)) not in choices:
            raise DataError(f"{folder / FACTS}: {key} must be one of {', '.join(choices)}, found {value!r}")
    return base


def base_of_adapters(adapters: Mapping[str, str]) -> BaseModel:
    """The common base model of several adapters (name -> adapter, as for `find_adapter`); a DataError without one."""
    if not adapters:
        raise DataError(
            "no base model: give model.init_args.base.name_or_path, or model.init_args.adapters, which name one"
        )
    bases = {name: base_of_adapter(adapter) for name, adapter in adapters.items()}
    # Without a card, the dtype of an adapter's training is unknown. `min` takes the first of equal ones.
    first, one = min(bases.items(), key=lambda item: item[1].dtype == "auto")
    for name, base in bases.items():
        one_key, key = ((os.path.realpath(b.name_or_path), b.revision, b.quantization) for b in (one, base))
        if key != one_key or base.dtype not in (one.dtype, "auto"):
            raise DataError(
                f"the adapters {first!r} and {name!r} have different base models: {describe(one)} and {describe(base)}; "
                "evaluate them separately, or set model.init_args.base.name_or_path for both"
            )
    return one


def describe(base: BaseModel) -> str:
    revision = f"@{base.revision}" if base.revision else ""
    kind = "" if base.quantization == "none" else f", {base.quantization}"
    return f"{base.name_or_path}{revision} ({base.dtype}{kind})"


def read_object(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object; raises a DataError if it cannot be read, or has another form."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object")
    return content


def processor_source(adapter: Path | None, base: BaseModel) -> str:
    """The folder or name of the processor: that of the adapter if it has one, else that of the base model."""
    own = adapter is not None and any(adapter.glob("*processor_config.json"))
    return str(adapter) if own else base.name_or_path
