"""A merged model is written as its base's released checkpoint: the same names, shapes, dtypes, files and configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlm_calibration.models.adapters import LoraSettings, attach_lora, layer_parts, load_adapters
from vlm_calibration.models.checkpoint import Checkpoint, find_weights
from vlm_calibration.models.export import merge_adapter, save_merged
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.records import DataError

from .families import FOUR, build, collated, new_prompts, randomize_adapters, save_published

CLOSE = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture
def adapter_of(tmp_path: Path) -> Callable[[str], str]:
    """Function that writes a random adapter of all parts of a model."""

    def write(base: str) -> str:
        model = load_base(BaseModel(base, dtype="float32"))
        parts: list[Any] = sorted(set(layer_parts(model).values()))
        randomize_adapters(attach_lora(model, LoraSettings(r=2, parts=parts))).save_pretrained(
            tmp_path / "adapter"
        )
        return str(tmp_path / "adapter")

    return write


def _tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """File name -> its tensors by name."""
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def _layout(folder: Path) -> dict[str, Any]:
    return {
        file: {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        for file, tensors in _tensors(folder).items()
    }


def _changed(folder: Path, other: Path) -> int:
    before, after = _tensors(folder), _tensors(other)
    return sum(not torch.equal(t, after[file][name]) for file in before for name, t in before[file].items())


def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


@pytest.mark.parametrize("family", FOUR)
def test_merged_is_laid_out_as_released_and_answers_as_the_adapter_does(
    family: str, adapter_of: Callable[[str], str], tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    save_published(family, build(family), base)
    adapter = adapter_of(str(base))
    merged = merge_adapter(adapter, BaseModel(str(base)))
    save_merged(merged, out)
    assert _layout(out) == _layout(base)
    assert _changed(base, out) == len(merged.layers)
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    read, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    inputs = collated(new_prompts(family, n=1))
    adapted = load_adapters(load_base(BaseModel(str(base))), {"default": adapter})
    torch.testing.assert_close(_logits(read, inputs), _logits(adapted, inputs), **CLOSE)
    assert not torch.allclose(
        _logits(read, inputs), _logits(load_base(BaseModel(str(base))), inputs), atol=1e-2
    )


def test_shards_and_index_stay(adapter_of: Callable[[str], str], tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    save_published("gemma3", build("gemma3", dtype=torch.bfloat16), base, max_shard_size="40KB")
    assert len(_tensors(base)) > 2
    merged = merge_adapter(adapter_of(str(base)), BaseModel(str(base)))
    save_merged(merged, out)
    assert _layout(out) == _layout(base)
    assert _changed(base, out) == len(merged.layers)
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((base / index).read_text())
    assert load_base(BaseModel(str(out))).dtype == torch.bfloat16
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as before, safe_open(out / path.name, "pt") as after:
            assert before.metadata() == after.metadata()


def test_another_dtype_is_in_weights_index_and_configuration(
    adapter_of: Callable[[str], str], tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    save_published("llava_clip", build("llava_clip"), base, max_shard_size="40KB")
    save_merged(merge_adapter(adapter_of(str(base)), BaseModel(str(base)), "bfloat16"), out)
    tensors = [t for file in _tensors(out).values() for t in file.values()]
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    assert before.pop("dtype") == "float32"
    assert after.pop("dtype") == "bfloat16"
    assert {**after["text_config"], "dtype": None} == {**before["text_config"], "dtype": None}


def test_each_tensor_keeps_its_dtype(adapter_of: Callable[[str], str], tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    save_published("qwen2_5_vl", build("qwen2_5_vl"), base)
    weights = load_file(base / "model.safetensors")
    weights = {n: w.bfloat16() if n.startswith("model.layers") else w for n, w in weights.items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    save_merged(merge_adapter(adapter_of(str(base)), BaseModel(str(base))), out)
    assert _layout(out) == _layout(base)
    assert len({kind for file in _layout(out).values() for _, kind in file.values()}) == 2


def test_weights_files_of_pytorch_become_safetensors(
    adapter_of: Callable[[str], str], tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    save_published("llava_clip", build("llava_clip"), base)
    layout = _layout(base)
    weights = load_file(base / "model.safetensors")
    torch.save(weights, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    merged = merge_adapter(adapter_of(str(base)), BaseModel(str(base)))
    save_merged(merged, out)
    assert _layout(out) == layout
    assert not list(out.glob("*.bin"))


def test_a_base_in_the_cache_of_the_hub(
    adapter_of: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, cache = "a" * 40, tmp_path / "hub"
    repository = cache / "models--org--base"
    save_published("smolvlm", build("smolvlm"), tmp_path / "base")
    adapter = adapter_of(str(tmp_path / "base"))
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for path in (tmp_path / "base").iterdir():
        shutil.move(path, repository / "blobs" / path.name)
        (repository / "snapshots" / commit / path.name).symlink_to(repository / "blobs" / path.name)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(cache), raising=False)
    save_merged(merge_adapter(adapter, BaseModel("org/base")), tmp_path / "merged")
    assert _layout(tmp_path / "merged") == _layout(repository / "snapshots" / commit)
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())


# --- Finding a weight -----------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Function that writes a checkpoint of some tensors."""

    def write(**tensors: torch.Tensor) -> Checkpoint:
        save_file(tensors, tmp_path / "model.safetensors")
        return Checkpoint(tmp_path, (tmp_path / "model.safetensors",))

    return write


def test_a_weight_is_found_by_its_values_in_any_dtype_and_shape(stored: Callable[..., Checkpoint]) -> None:
    w = torch.randn(6, 35).bfloat16()
    nearly = w.clone()
    nearly[5, 33] += 1
    files = stored(**{"a.weight": w.reshape(6, 5, 7), "b.weight": nearly})
    assert find_weights({"m.c.weight": w.float()}, files) == {"m.c.weight": ("a.weight", torch.bfloat16)}


def test_equal_weights_are_told_apart_by_their_names(stored: Callable[..., Checkpoint]) -> None:
    w = torch.ones(3, 3)
    files = stored(**{f"lm.layers.{i}.q.weight": w.clone() for i in (0, 1, 10)})
    found = find_weights({f"model.lm.layers.{i}.q.weight": w for i in (10, 0)}, files)
    assert {name: s.name for name, s in found.items()} == {
        f"model.lm.layers.{i}.q.weight": f"lm.layers.{i}.q.weight" for i in (0, 10)
    }


@pytest.mark.parametrize(
    ("stored_names", "names"),
    [(["q.weight"], ["k.bias", "v.bias"]), (["a.weight", "b.weight"], ["c.weight"])],
)
def test_weights_that_cannot_be_told_apart_are_named(
    stored: Callable[..., Checkpoint], stored_names: list[str], names: list[str]
) -> None:
    w = torch.ones(3)
    with pytest.raises(ValueError, match=f"{names[0]}.*same values"):
        find_weights(dict.fromkeys(names, w), stored(**{name: w.clone() for name in stored_names}))


def test_a_weight_that_is_not_stored_as_it_is_loaded_is_named(
    stored: Callable[..., Checkpoint],
) -> None:
    """As if transformers had split it from a tensor that holds several."""
    q, k = torch.randn(2, 4, 4)
    files = stored(**{"layers.0.qk.weight": torch.cat([q, k]), "layers.0.o.weight": k})
    with pytest.raises(ValueError, match=r"m\.layers\.0\.q\.weight is not stored as one tensor"):
        find_weights({"m.layers.0.o.weight": k, "m.layers.0.q.weight": q}, files)


def test_trained_biases_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    save_published("llava_clip", build("llava_clip"), tmp_path / "base")
    model = get_peft_model(
        load_base(BaseModel(str(tmp_path / "base"))),
        LoraConfig(r=2, target_modules=["up_proj"], bias="lora_only"),
    )
    randomize_adapters(model).save_pretrained(tmp_path / "adapter")
    with pytest.raises(DataError, match="it has trained biases"):
        merge_adapter(str(tmp_path / "adapter"), BaseModel(str(tmp_path / "base")))
