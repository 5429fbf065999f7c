"""The models of `tests.performance.gpu`: published architectures with random weights, or tiny ones of the same families, written like a checkpoint.

The Hub is not asked. Processors are those of `tests/models/processors.py` at the published image sizes, with a small tokenizer: the model keeps
its published vocabulary, of which most ids are then never used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tests.models.processors import FAMILIES, SMOLVLM2, Family
from tests.models.published import MODELS
from tests.performance.preference import write_adapter


@dataclass(frozen=True)
class BenchModel:
    """A model of the benchmark.

    Attributes:
        family: key of `FAMILIES`.
        side: pixels a side of the images that it is asked about.
        images: settings of the family's image processor; None: those of a tiny model, which this then is.
    """

    family: str
    side: int
    images: dict[str, Any] | None = None

    @property
    def tiny(self) -> bool:
        return self.images is None


QWEN2_5: dict[str, Any] = {"patch": 14, "pixels": (56 * 56, 1280 * 28 * 28)}
QWEN3: dict[str, Any] = {"patch": 16, "pixels": (64 * 64, 1280 * 32 * 32)}
REAL = {
    "qwen2_5_vl_3b": BenchModel("qwen2_5_vl", 1024, QWEN2_5),
    "qwen2_5_vl_7b": BenchModel("qwen2_5_vl", 1024, QWEN2_5),
    "qwen3_vl_4b": BenchModel("qwen3_vl", 1024, QWEN3),
    "smolvlm2_2_2b": BenchModel("smolvlm", 1024, SMOLVLM2),
}
"""Name in `tests/models/published.py` -> model; an image of 1024 x 1024 pixels has 1,225, 1,024 and 1,377 tokens."""
TINY = {f"tiny {family}": BenchModel(family, 48) for family in ("qwen2_5_vl", "qwen3_vl", "smolvlm")}
SETS = {"real": REAL, "tiny": TINY}


def write_random(name: str, folder: Path, device: str) -> None:
    """Write a model in bfloat16 with its processor and, in `adapter/`, a LoRA adapter without zero weights.

    Args:
        name: key of `REAL` or `TINY`.
        folder: where to.
        device: on which the weights are drawn.
    """
    entry = {**REAL, **TINY}[name]
    family = FAMILIES[entry.family](**(entry.images or {}))
    torch.manual_seed(0)
    if entry.tiny:
        model = family.model(dtype=torch.bfloat16)
    else:
        with torch.device(device):
            config = with_tokens_of(family, MODELS[name].config())
            model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    write_adapter(model, folder)


def with_tokens_of(family: Family, config: Any) -> Any:
    """A published configuration with the special tokens of a family's tokenizer.

    Raises:
        ValueError: the tokenizer has more tokens than the published vocabulary.
    """
    spec, text = family.spec, config.get_text_config()
    if spec.vocabulary > text.vocab_size:
        raise ValueError(
            f"{family.name}: {spec.vocabulary} tokens, of which the model knows {text.vocab_size}"
        )
    for part in (config, text):
        part.pad_token_id, part.bos_token_id, part.eos_token_id = spec.pad, spec.begin, spec.end
    tokens = spec.qwen_tokens if family.name.startswith("qwen") else {"image_token_id": spec.image}
    for key, token in tokens.items():
        setattr(config, key, token)
    return config
