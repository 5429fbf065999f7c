"""Memory by arithmetic: weights against loaded ones, a reference, keys and values against a real cache, and published sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_calibration.models.adapters import LoraSettings, attach_lora, continue_adapter
from vlm_calibration.models.loading import BaseModel, load_for_training
from vlm_calibration.models.memory import cache_bytes, model_memory, quantised_bytes

from .families import Spec, build
from .published import MODELS

pytestmark = pytest.mark.slow

LORA = LoraSettings(dropout=0.0)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose language model has widths that are multiples of 64, as required by nf4."""
    folder = tmp_path_factory.mktemp("wide")
    build("llava_clip", dtype=torch.bfloat16, spec=Spec(width=128)).save_pretrained(folder)
    return str(folder)


def _stored(model: Any) -> Iterator[int]:
    """Bytes of every weight, including quantisation scales without constant tables."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        yield parameter.nbytes
        if state is not None:
            yield state.absmax.nbytes + state.state2.absmax.nbytes
        elif parameter.dtype == torch.int8:
            yield parameter.SCB.nbytes


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_weights_take_what_loaded_ones_take(wide_folder: str, quantization: Any) -> None:
    base = BaseModel(wide_folder, dtype="bfloat16", quantization=quantization)
    expected = sum(_stored(attach_lora(load_for_training(base), LORA)))
    assert model_memory(base, LORA).weights == expected


def test_quantised_bytes() -> None:
    assert quantised_bytes((64, 256), "nf4") == 64 * 256 // 2 + 256 + 4
    assert quantised_bytes((64, 257), "nf4") == 64 * 257 // 2 + 257 + 2 * 4
    assert quantised_bytes((64, 256), "int8") == 64 * 256 + 64 * 4


def test_a_reference_is_a_second_adapter(model_folder: str, new_adapter: Callable[..., str]) -> None:
    lora = LoraSettings(r=4, alpha=8, dropout=0.0, parts=["language", "projector"])
    base = BaseModel(model_folder, dtype="float32")
    real = continue_adapter(load_for_training(base), new_adapter(1, parts=lora.parts), ["language"])
    memory = model_memory(base, lora, adapters=2, trained=["language"])
    trained = [p for p in real.parameters() if p.requires_grad]
    assert memory.parameters == sum(p.numel() for p in real.parameters())
    assert memory.weights == sum(p.nbytes for p in real.parameters())
    assert memory.trained == sum(p.numel() for p in trained)
    assert memory.gradients == sum(p.nbytes for p in trained)
    assert model_memory(base, lora).trained > memory.trained
    half = model_memory(base, lora, cast=torch.bfloat16)
    assert half.weights * 2 == model_memory(base, lora).weights


def test_keys_and_values_take_what_a_real_cache_takes(load_model: Callable[..., Any]) -> None:
    model = load_model()
    with torch.no_grad():
        cache = model(input_ids=torch.full((3, 7), 5), use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model.config, 3 * 7, 4) == real


@pytest.mark.parametrize("name", MODELS)
def test_published_sizes(name: str, tmp_path: Path) -> None:
    MODELS[name].config().save_pretrained(tmp_path)
    base = BaseModel(str(tmp_path), dtype="bfloat16")
    memory = model_memory(base, LORA, adapters=0, training=False)
    assert memory.parameters == pytest.approx(MODELS[name].parameters, rel=0.005)
    assert memory.weights == 2 * memory.parameters
