"""The model options of `ask` and `app`, and the model that they load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveInt

from vlm_calibration.models.base import BaseModel, Dtype, Quantization, base_of_adapter

if TYPE_CHECKING:
    from vlm_calibration.estimators.decision import DecisionRule
    from vlm_calibration.inference.model import CalibratedModel

DEMO_RUNS = ("runs/dpo", "runs/sft")
"""Where the demo's adapters are after training, in order of preference."""


@dataclass(frozen=True)
class ModelOptions:
    """model

    Attributes:
        adapter: a run directory, the folder of an adapter, or its name on the Hub (owner/name, owner/name@revision)
        base: name or folder of the base model (default: the one that the adapter names; without an adapter the demo's, with
            runs/dpo or runs/sft)
        device: "cpu", "cuda:1", ... (default: a GPU if any)
        dtype: of the weights (default: the adapter's or checkpoint's)
        quantization: of the language model (default: the adapter's or none)
        base_revision: branch, tag or commit of the base model on the Hub
        trust_remote_code: run code that comes with the base model
        max_new_tokens: length limit of an answer
    """

    adapter: str | None = None
    base: str | None = None
    device: str | None = None
    dtype: Dtype | None = None
    quantization: Quantization | None = None
    base_revision: str | None = None
    trust_remote_code: bool = False
    max_new_tokens: PositiveInt | None = None


def load_model(
    options: ModelOptions, check: Callable[[DecisionRule | None], None] | None = None
) -> CalibratedModel:
    """Load the model that the options name, or else the demo's model with the adapter that was trained on it.

    Args:
        options: name the model.
        check: takes its decision rule before the model is loaded, and raises if the rule is not enough.

    Raises:
        DataError: see `load_calibrated`.
    """
    from vlm_calibration.inference.model import DEMO_MODEL, load_calibrated, rule_of

    base, adapter = options.base, options.adapter
    if base is None and adapter is None:
        base, adapter = str(DEMO_MODEL), next((run for run in DEMO_RUNS if _is_trained(run)), None)
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
    if check is not None:
        check(rule_of(model, adapter))
    return load_calibrated(model, adapter, device=options.device, max_new_tokens=options.max_new_tokens)


def _is_trained(run: str) -> bool:
    return (Path(run) / "adapter" / "adapter_config.json").is_file()
