"""The model options of `ask` and `app`, and the model that they load."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from vlm_calibration.models.base import DEMO_MODEL, BaseModel, Dtype, Quantization, base_of_adapter
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from vlm_calibration.estimators.decision import DecisionRule
    from vlm_calibration.inference.asking import CalibratedModel


def check_folder(folder: Path | str) -> None:
    """Refuse the folder of an evaluation that does not exist, before torch is imported to read it; raises a DataError."""
    if not Path(folder).is_dir():
        advice = "evaluate first, or name another folder"
        raise DataError(f"no predictions.jsonl in {folder}, which is no folder: {advice}")


def refuse(options: Mapping[str, Any], why: str) -> None:
    """Raise an ArgumentError if one of the options (name -> value) is given."""
    for name, value in options.items():
        if value not in (None, False):
            raise ArgumentError(None, f"--{name.replace('_', '-')} {why}")


@dataclass(frozen=True)
class ModelOptions:
    """model

    Attributes:
        adapter: a run directory, the folder of an adapter, or its name on the Hub (owner/name, owner/name@revision)
        base: name or folder of the base model (default: that of the adapter; without one the demo's, with runs/dpo or runs/sft)
        device: "cpu", "cuda:1", ... (default: a GPU if any)
        dtype: of the weights (default: the adapter's or checkpoint's)
        quantization: of the language model (default: the adapter's or none)
        base_revision: branch, tag or commit of the base model on the Hub
        trust_remote_code: run code that comes with the base model
        max_new_tokens: length limit of an answer
        url: address of an OpenAI-compatible API to ask instead, such as http://127.0.0.1:8000/v1, by the key in OPENAI_API_KEY
        served_model: name under which the API knows the model
    """

    adapter: str | None = None
    base: str | None = None
    device: str | None = None
    dtype: Dtype | None = None
    quantization: Quantization | None = None
    base_revision: str | None = None
    trust_remote_code: bool = False
    max_new_tokens: PositiveInt | None = None
    url: str | None = None
    served_model: str | None = None


def load_model(
    options: ModelOptions, check: Callable[[DecisionRule | None], None] | None = None
) -> CalibratedModel:
    """Load the model that the options name, or the demo's with its trained adapter; `check` gets its decision rule before, and may raise.

    An ArgumentError if the options contradict each other.
    """
    max_new_tokens = options.max_new_tokens
    if options.url is not None or options.served_model is not None:
        if options.url is None or options.served_model is None:
            raise ArgumentError(None, "--url and --served-model belong together")
        of_both = {"url": None, "served_model": None, "max_new_tokens": None}
        refuse({**vars(options), **of_both}, "is for a model that is loaded here, not for --url")
        if check is not None:
            check(None)  # it has no decision rule
        from vlm_calibration.endpoint.client import Endpoint
        from vlm_calibration.inference.asking import served_model

        return served_model(Endpoint(options.url, options.served_model), max_new_tokens or 64)
    base, adapter = options.base, options.adapter
    if base is None and adapter is None:
        runs = ("runs/dpo", "runs/sft")  # where the demo's adapters are after training
        trained_runs = (run for run in runs if Path(run, "adapter/adapter_config.json").is_file())
        base, adapter = str(DEMO_MODEL), next(trained_runs, None)
        trained = f"and the adapter in {adapter}" if adapter else "alone (`make train-sft` trains an adapter)"
        print(f"asking the demo's model {trained}", file=sys.stderr)
    model = BaseModel(base) if base is not None else base_of_adapter(str(adapter))
    model = replace(
        model,
        dtype=options.dtype or model.dtype,
        quantization=options.quantization or model.quantization,
        revision=options.base_revision or model.revision,
        trust_remote_code=options.trust_remote_code,
    )
    from vlm_calibration.inference.model import load_calibrated, rule_of

    if check is not None:
        check(rule_of(model, adapter))
    return load_calibrated(model, adapter, device=options.device, max_new_tokens=max_new_tokens)
