"""What `ask` and `app` have in common on the command line: which model is asked."""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from vlm_calibration.arguments import positive
from vlm_calibration.models.base import BaseModel, Dtype, Quantization, base_of_adapter

if TYPE_CHECKING:
    from vlm_calibration.inference.model import CalibratedModel

DEMO_RUNS = ("runs/dpo", "runs/sft")
"""Where the demo's adapters are after training, the one to prefer first."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_model` reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--adapter",
        metavar="RUN",
        help="a run directory, the folder of an adapter, or its name on the Hub (owner/name, owner/name@revision)",
    )
    group.add_argument(
        "--base",
        metavar="MODEL",
        help="name or folder of the base model (default: the one that the adapter names; without an adapter the demo's, "
        f"with the adapter in {' or '.join(DEMO_RUNS)} if there is one)",
    )
    group.add_argument("--device", help='e.g. "cpu" or "cuda:1" (default: a GPU if there is one)')
    trained = "(default: as the adapter was trained with, else {})"
    group.add_argument(
        "--dtype",
        choices=get_args(Dtype),
        help=f"of the weights {trained.format('that of the checkpoint')}",
    )
    group.add_argument(
        "--quantization",
        choices=get_args(Quantization),
        help=f"of the language model {trained.format('none')}",
    )
    group.add_argument("--revision", help="branch, tag or commit of the base model on the Hub")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base")
    group.add_argument("--max-new-tokens", type=positive, metavar="N", help="length limit of an answer")


def load_model(found: argparse.Namespace) -> CalibratedModel:
    """Load what the options name; where they name nothing, the demo's model with what was trained on it.

    Raises:
        DataError: see `load_calibrated`.
    """
    _quiet()
    from vlm_calibration.inference.model import DEMO_MODEL, load_calibrated

    base, adapter = found.base, found.adapter
    if base is None and adapter is None:
        base, adapter = str(DEMO_MODEL), next((run for run in DEMO_RUNS if _is_trained(run)), None)
        trained = f"and the adapter in {adapter}" if adapter else "alone (`make train-sft` trains an adapter)"
        print(f"asking the demo's model {trained}", file=sys.stderr)
    named = base_of_adapter(adapter) if base is None else BaseModel(base)
    model = replace(
        named,
        dtype=found.dtype or named.dtype,
        quantization=found.quantization or named.quantization,
        revision=found.revision or named.revision,
        trust_remote_code=found.trust_remote_code,
    )
    return load_calibrated(model, adapter, device=found.device, max_new_tokens=found.max_new_tokens)


def _is_trained(run: str) -> bool:
    return (Path(run) / "adapter" / "adapter_config.json").is_file()


def _quiet() -> None:
    """Keep from the terminal what libraries say that nobody who asks a question can act on."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
