"""Loading a vision-language model by name or folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vlm_calibration.records import DataError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class BaseModel:
    """Which base model to load, and how.

    Args:
        name_or_path: name on the Hub, or a folder that `from_pretrained` reads.
        dtype: of the weights; "auto" keeps what the checkpoint says.
        attn_implementation: attention kernel, e.g. "sdpa", "eager" or "flash_attention_2"; None: transformers' choice.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run modelling code that comes with the checkpoint.
    """

    name_or_path: str
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


def load_vlm(base: BaseModel) -> PreTrainedModel:
    """Load the model onto the CPU, in eval mode.

    Raises:
        DataError: there is no such model, or it cannot be loaded in this way.
    """
    try:
        return AutoModelForImageTextToText.from_pretrained(
            base.name_or_path,
            dtype=base.dtype if base.dtype == "auto" else getattr(torch, base.dtype),
            attn_implementation=base.attn_implementation,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        kind = "folder" if Path(base.name_or_path).exists() else "name on the Hub or folder"
        raise DataError(
            f"cannot load a model from the {kind} {base.name_or_path!r}: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
