"""Merging: the written model answers as the adapted one under the names of its base, and a misfit adapter is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, modeling_utils

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.models import export
from vlm_calibration.models.adapters import LoraSettings, attach_lora, layer_parts
from vlm_calibration.models.base import DEMO_MODEL, find_adapter
from vlm_calibration.models.export import merge_adapter, save_merged
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.records import DataError

from .families import FOUR, build, randomize_adapters, save_published
from .processors import cached_family, prompts_of

WEIGHTS = "adapter_model.safetensors"
ALL_PARTS: list[Any] = ["language", "tower", "projector"]
CLOSE = {"atol": 1e-4, "rtol": 1e-5}
DEMO = str(DEMO_MODEL)
"""The demo's trained model. The random weights of `model_folder` amplify rounding errors."""


def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def _adapted(base: str, adapter: str) -> PeftModel:
    return PeftModel.from_pretrained(load_base(BaseModel(base, dtype="float32")), adapter).eval()


def _layout(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {n: (t.shape, t.dtype) for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}


def _merge(adapter: str, base: str, out: Path, dtype: Any = "auto") -> tuple[str, ...]:
    """Merge and write; returns the names of the changed layers."""
    model, layers = merge_adapter(adapter, BaseModel(base), dtype)
    save_merged(model, BaseModel(base), out)
    return layers


@pytest.fixture
def adapter_of(tmp_path: Path) -> Callable[[Path | str], str]:
    """Writes a random adapter of all parts of a model."""

    def write(base: Path | str) -> str:
        model = load_base(BaseModel(str(base), dtype="float32"))
        parts = sorted(set(layer_parts(model).values()))
        model = randomize_adapters(attach_lora(model, LoraSettings(r=2, parts=parts)))
        model.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    return write


# --- The written model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FOUR, "smolvlm"])
def test_merged_is_laid_out_as_released_and_answers_as_the_adapter_does(
    family: str, adapter_of: Callable[[Path], str], tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    save_published(family, cached_family(family).model(), base)
    adapter = adapter_of(base)
    layers = _merge(adapter, str(base), out)
    assert _layout(out) == _layout(base)
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert sum(not torch.equal(before[name], after[name]) for name in before) == len(layers)
    read, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    if family != "smolvlm":
        inputs, _ = prompts_of(family, n=1)
        models = (read, _adapted(str(base), adapter), load_base(BaseModel(str(base))))
        merged, adapted, plain = (_logits(model, inputs) for model in models)
        torch.testing.assert_close(merged, adapted, **CLOSE)
        assert not torch.allclose(merged, plain, atol=1e-2)


@pytest.mark.parametrize(
    ("source", "stored", "dtype"), [("shards", "float32", "bfloat16"), ("pytorch", "bfloat16", "auto")]
)
def test_another_dtype_is_in_weights_and_configuration_whatever_the_files_of_the_base(
    adapter_of: Callable[[Path], str], tmp_path: Path, source: str, stored: str, dtype: Any
) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    model, shard = build("llava_clip", dtype=getattr(torch, stored)), "40KB" if source == "shards" else "1GB"
    save_published("llava_clip", model, base, max_shard_size=shard)
    layout, adapter = _layout(base), adapter_of(base)
    if source == "pytorch":
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    exact = merge_adapter(adapter, BaseModel(str(base)), "float32")[0].state_dict()
    _merge(adapter, str(base), out, dtype)
    assert _layout(out) == {name: (shape, torch.bfloat16) for name, (shape, _) in layout.items()}
    written = load_base(BaseModel(str(out))).state_dict()
    assert all(torch.equal(w, exact[name].to(torch.bfloat16)) for name, w in written.items()), "rounded once"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    assert (before.pop("dtype"), after.pop("dtype")) == (stored, "bfloat16")
    assert {**after["text_config"], "dtype": None} == {**before["text_config"], "dtype": None}


def test_a_base_in_the_cache_of_the_hub(
    adapter_of: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, cache = "a" * 40, tmp_path / "hub"
    repository = cache / "models--org--base"
    save_published("smolvlm", build("smolvlm"), tmp_path / "base")
    adapter = adapter_of(tmp_path / "base")
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for path in (tmp_path / "base").iterdir():
        shutil.move(path, repository / "blobs" / path.name)
        (repository / "snapshots" / commit / path.name).symlink_to(repository / "blobs" / path.name)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(cache), raising=False)
    _merge(adapter, "org/base", tmp_path / "merged")
    assert _layout(tmp_path / "merged") == _layout(repository / "snapshots" / commit)
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())


def test_the_merged_model_is_told_to_generate_greedily_and_where_to_end(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "base")
    tokens = {"eos_token_id": [1, 7], "pad_token_id": 2}
    settings = {**tokens, "repetition_penalty": 1.05, "do_sample": True, "temperature": 0.1, "max_length": 9}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(settings))
    _merge(new_adapter(1), str(tmp_path / "base"), tmp_path / "merged")
    written = json.loads((tmp_path / "merged/generation_config.json").read_text())
    written.pop("transformers_version", None)
    assert written == {**tokens, "do_sample": False, "num_beams": 1}


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda weights, name: weights.pop(name), "was not read back as written: .*q_proj"),
        (lambda weights, name: weights.update({name: weights[name] + 1}), "1 weights differ"),
    ],
    ids=["missing", "changed"],
)
def test_what_reads_back_otherwise_is_an_error(
    model_folder: str,
    new_adapter: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoilt: Callable[[dict[str, torch.Tensor], str], Any],
    message: str,
) -> None:
    def save(weights: dict[str, torch.Tensor], path: Path, metadata: Any) -> None:
        spoilt(weights, next(name for name in weights if "q_proj" in name))
        save_file(weights, path, metadata)

    monkeypatch.setattr(modeling_utils, "safe_save_file", save)
    with pytest.raises(DataError, match=message):
        _merge(new_adapter(1), model_folder, tmp_path / "merged")


def test_weights_under_other_names_than_the_base_s_are_an_error(
    adapter_of: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers would write a model that it has not loaded."""
    base = tmp_path / "base"
    save_published("llava_clip", build("llava_clip"), base)

    def load_without_names(base: BaseModel) -> Any:
        model: Any = load_base(base)
        model._weight_conversions = None
        return model

    monkeypatch.setattr(export, "load_base", load_without_names)
    says = r"does not have by this name and shape, the first is \S*vision_tower"
    with pytest.raises(DataError, match=says):
        _merge(adapter_of(base), str(base), tmp_path / "merged")


# --- Merged weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({}, BaseModel(DEMO, dtype="bfloat16", quantization="int8")),
        ({"use_dora": True}, BaseModel(DEMO)),
        ({"use_rslora": True}, BaseModel(DEMO)),
    ],
    ids=["LoRA of a quantised base", "DoRA", "rsLoRA"],
)
def test_merged_is_adapted_in_full_precision(
    new_adapter: Callable[..., str], prompts: PromptBatch, settings: dict[str, Any], base: BaseModel
) -> None:
    adapter = new_adapter(1, parts=ALL_PARTS, **settings)
    merged, layers = merge_adapter(adapter, base)
    assert not merged.training
    assert getattr(merged.config, "quantization_config", None) is None
    logits = [_logits(model, prompts.inputs) for model in (merged, _adapted(DEMO, adapter))]
    torch.testing.assert_close(*logits, **CLOSE)
    weights = dict(load_base(BaseModel(DEMO)).named_parameters())
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, weights[n])}
    assert changed == {f"{layer}.weight" for layer in layers}
    assert len(changed) == 4 * 7 + 4 * 6 + 2


# --- Misfit adapters ---


def _rewritten(
    adapter: str,
    tmp_path: Path,
    weight: Callable[[str, torch.Tensor], torch.Tensor] = lambda n, w: w,
    name: Callable[[str], str] = lambda n: n,
    **config: Any,
) -> str:
    """A copy of an adapter with other weights, names or settings."""
    folder = tmp_path / "rewritten"
    folder.mkdir()
    weights = load_file(Path(adapter) / WEIGHTS)
    save_file({name(n): weight(n, w).contiguous() for n, w in weights.items()}, folder / WEIGHTS)
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return str(folder)


def _refused(adapter: str, base: str, dtype: Any = "auto") -> str:
    with pytest.raises(DataError) as caught:
        merge_adapter(adapter, BaseModel(base), dtype)
    text = str(caught.value)
    assert "\n" not in text
    assert adapter in text
    assert base in text
    return text.split(": ", 1)[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"name": lambda n: n.replace("model.language_model.", "model.text_model.")},
            "its file lacks 28 layers of the model, the first is model.language_model",
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ".*vision_tower.*"},
            "the model lacks 24 layers of its file, the first is model.language_model.layers.0.",
        ),
        ({"target_modules": ["wqkv"]}, "wqkv"),
        ({"weight": lambda n, w: w * float("nan") if "layers.2" in n else w}, "NaN"),
        ({"weight": lambda n, w: w * 0 if "lora_B" in n else w}, "all its updates are zero"),
        ({"weight": lambda n, w: w[..., :-1] if "lora_A" in n else w}, "size mismatch for "),
    ],
    ids=["other names", "fewer targets", "no target", "NaN", "untrained", "other size"],
)
def test_an_adapter_that_does_not_fit_is_refused(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    """peft alone would return the base model with a warning at most."""
    message = _refused(_rewritten(new_adapter(1), tmp_path, **changes), model_folder)
    assert says in message
    if "lacks" in says:
        assert "one of the two has changed" in message, "it names this base model, so another is no advice"


def test_updates_that_rounding_would_lose_are_refused_and_layers_without_one_stay(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    """LLaVA does not use the last layer of its tower, so an adapter there gets no updates."""
    adapter = _rewritten(
        new_adapter(1), tmp_path, lambda n, w: w * (0 if "layers.3" in n else 1e-7) if "lora_B" in n else w
    )
    merged, layers = merge_adapter(adapter, BaseModel(model_folder))
    assert len(layers) == 4 * 7
    before, after = (m.state_dict() for m in (load_base(BaseModel(model_folder)), merged))
    unchanged = {n for n in layers if torch.equal(before[f"{n}.weight"], after[f"{n}.weight"])}
    assert unchanged == {n for n in layers if "layers.3." in n}
    says = r"the updates of \d+ of 28 layers change nothing in torch\.bfloat16, the first is"
    assert re.match(says, _refused(adapter, model_folder, "bfloat16"))


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_damaged_file(tmp_path: Path, size: int) -> None:
    file = tmp_path / WEIGHTS
    save_file({"a": torch.ones(999)}, file)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert find_adapter(tmp_path) == tmp_path
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DataError, match=rf"^{file}: damaged or truncated .* train it again$"):
        find_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore:.*ied.*embed|ie.*embed|.*embedding layers found")
@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            "it is not a LoRA adapter",
        ),
        (
            LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
            "it adapts model.language_model.embed_tokens, which shares its weights with lm_head",
        ),
        (LoraConfig(r=2, target_modules=["up_proj"], bias="lora_only"), "it has trained biases"),
    ],
    ids=["IA3", "tied embeddings", "biases"],
)
def test_what_merging_would_change_otherwise_is_refused(
    load_model: Callable[..., Any], model_folder: str, tmp_path: Path, config: Any, says: str
) -> None:
    randomize_adapters(get_peft_model(load_model(), config)).save_pretrained(tmp_path / "adapter")
    assert _refused(str(tmp_path / "adapter"), model_folder).startswith(says)


def test_a_base_that_is_stored_quantised(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForImageTextToText.from_pretrained(model_folder, quantization_config=config)
    model.save_pretrained(tmp_path / "quantised")
    with pytest.raises(DataError, match="quantised' is stored quantised, and nothing can be merged into it"):
        merge_adapter(new_adapter(1), BaseModel(str(tmp_path / "quantised")))


def test_whole_modules_may_be_in_an_adapter(prompts: PromptBatch, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["linear_1"])
    model = randomize_adapters(get_peft_model(load_base(BaseModel(DEMO)), config))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data *= 1.1
    model.save_pretrained(tmp_path)
    merged, _ = merge_adapter(str(tmp_path), BaseModel(DEMO))
    logits = [_logits(m, prompts.inputs) for m in (merged, _adapted(DEMO, str(tmp_path)))]
    torch.testing.assert_close(*logits, **CLOSE)
    name = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(merged.get_parameter(name), load_base(BaseModel(DEMO)).get_parameter(name))
