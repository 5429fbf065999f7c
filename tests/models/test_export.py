"""Merging: the merged model equals the adapted one and differs from the base, and a misfit adapter is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.models import checkpoint
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.base import base_of_adapter
from vlm_calibration.models.export import merge_adapter, save_merged
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.records import DataError

from .families import build, collated, new_prompts, randomize_adapters

WEIGHTS = "adapter_model.safetensors"
ALL_PARTS = ["language", "tower", "projector"]
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits.float()


def _adapted(base: str, adapter: str) -> PeftModel:
    return PeftModel.from_pretrained(load_base(BaseModel(base, dtype="float32")), adapter).eval()


@pytest.fixture(scope="module")
def demo_model(root: Path) -> str:
    """The demo's trained model. The random weights of `model_folder` amplify rounding errors."""
    return str(root / "src/vlm_calibration/demo/model")


@pytest.fixture
def of_family(tmp_path: Path) -> Callable[..., tuple[str, str, dict[str, torch.Tensor]]]:
    """Builds a model of a family and a random adapter; returns their folders and inputs."""

    def make(family: str, parts: list[Any] = ALL_PARTS) -> tuple[str, str, dict[str, torch.Tensor]]:
        base, adapter = (str(tmp_path / name) for name in ("base", "adapter"))
        build(family).save_pretrained(base)
        model = attach_lora(load_base(BaseModel(base)), LoraSettings(r=4, parts=parts))
        randomize_adapters(model).save_pretrained(adapter)
        return base, adapter, collated(new_prompts(family, n=1))

    return make


# --- Merged weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["LoRA", "DoRA", "rsLoRA"]
)
def test_merged_is_adapted(
    demo_model: str, new_adapter: Callable[..., str], prompts: PromptBatch, settings: dict[str, Any]
) -> None:
    base = demo_model
    adapter = new_adapter(1, parts=ALL_PARTS, **settings)
    merged = merge_adapter(adapter, BaseModel(base))
    assert not merged.model.training
    logits = _logits(merged.model, prompts.inputs)
    torch.testing.assert_close(logits, _logits(_adapted(base, adapter), prompts.inputs), **CLOSE)
    plain = load_base(BaseModel(base))
    assert not torch.allclose(logits, _logits(plain, prompts.inputs), atol=0.1)
    weights = dict(plain.named_parameters())
    changed = {
        n.removesuffix(".weight")
        for n, p in merged.model.named_parameters()
        if not torch.equal(p, weights[n])
    }
    assert changed == set(merged.layers)
    assert len(changed) == 4 * 7 + 4 * 6 + 2


FRESH = """
import sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model, inputs, out = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(model, output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    logits = model(**torch.load(inputs, weights_only=True)).logits
torch.save(logits, out)
assert not [name for name in sys.modules if name.split(".")[0] in ("vlm_calibration", "peft")]
"""


@pytest.mark.slow
def test_transformers_alone_loads_what_was_written(
    demo_model: str, new_adapter: Callable[..., str], prompts: PromptBatch, tmp_path: Path
) -> None:
    adapter = new_adapter(1)
    save_merged(merge_adapter(adapter, BaseModel(demo_model)), tmp_path / "merged")
    torch.save(prompts.inputs, tmp_path / "inputs.pt")
    files = [str(tmp_path / name) for name in ("merged", "inputs.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", FRESH, *files], check=True, timeout=300)
    expected = _logits(_adapted(demo_model, adapter), prompts.inputs)
    torch.testing.assert_close(torch.load(files[2], weights_only=True), expected, **CLOSE)
    assert not list((tmp_path / "merged").glob("*.bin"))


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
        ("float32", "float16", torch.float16),
    ],
)
def test_weights_are_rounded_once(
    model_folder: str,
    new_adapter: Callable[..., str],
    tmp_path: Path,
    stored: Any,
    dtype: Any,
    expected: torch.dtype,
) -> None:
    base = str(tmp_path / "base")
    load_base(BaseModel(model_folder, dtype=stored)).save_pretrained(base)
    adapter = new_adapter(1)
    exact = merge_adapter(adapter, BaseModel(base), "float32").model.state_dict()
    merged = merge_adapter(adapter, BaseModel(base), dtype)
    assert all(torch.equal(w, exact[name].to(expected)) for name, w in merged.model.state_dict().items())
    save_merged(merged, tmp_path / "merged")
    assert load_base(BaseModel(str(tmp_path / "merged"))).dtype == expected


def test_the_merged_model_is_told_to_generate_greedily_and_where_to_end(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "base")
    tokens = {"eos_token_id": [1, 7], "pad_token_id": 2}
    settings = {**tokens, "repetition_penalty": 1.05, "do_sample": True, "temperature": 0.1, "max_length": 9}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(settings))
    save_merged(merge_adapter(new_adapter(1), BaseModel(str(tmp_path / "base"))), tmp_path / "merged")
    written = json.loads((tmp_path / "merged/generation_config.json").read_text())
    written.pop("transformers_version", None)
    assert written == {**tokens, "do_sample": False, "num_beams": 1}


def test_an_adapter_of_a_quantised_base_is_merged_in_full_precision(
    demo_model: str, prompts: PromptBatch, tmp_path: Path
) -> None:
    quantised = load_base(BaseModel(demo_model, dtype="float32", quantization="int8"))
    model = randomize_adapters(attach_lora(quantised, LoraSettings(r=4, alpha=8)))
    model.save_pretrained(tmp_path / "adapter")
    base = BaseModel(demo_model, quantization="int8", dtype="bfloat16")
    merged = merge_adapter(str(tmp_path / "adapter"), base).model
    assert getattr(merged.config, "quantization_config", None) is None
    expected = _logits(_adapted(demo_model, str(tmp_path / "adapter")), prompts.inputs)
    torch.testing.assert_close(_logits(merged, prompts.inputs), expected, **CLOSE)


def test_layers_without_an_update_stay_as_they_are(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    """LLaVA does not use the last layer of its tower, so an adapter there gets no updates."""
    adapter = _rewritten(
        new_adapter(1), tmp_path, lambda n, w: w * 0 if "layers.3" in n and "lora_B" in n else w
    )
    merged = merge_adapter(adapter, BaseModel(model_folder))
    assert len(merged.layers) == 4 * 7
    weights = dict(load_base(BaseModel(model_folder)).named_parameters())
    same = {
        n
        for n in merged.layers
        if torch.equal(merged.model.get_parameter(f"{n}.weight"), weights[f"{n}.weight"])
    }
    assert same == {n for n in merged.layers if "layers.3." in n}


# --- Misfit adapters ------------------------------------------------------------------------------------------------


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


def test_weights_of_other_names_are_not_merged_into_nothing(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    adapter = _rewritten(
        new_adapter(1), tmp_path, name=lambda n: n.replace("model.language_model.", "model.text_model.")
    )
    plain = _adapted(model_folder, adapter).merge_and_unload()
    base = dict(load_base(BaseModel(model_folder)).named_parameters())
    assert all(torch.equal(p, base[n]) for n, p in plain.named_parameters()), (
        "peft alone returns the base with a warning"
    )
    assert _refused(adapter, model_folder).startswith(
        "its file lacks the weights of 28 configured layers, the first is model.language_model"
    )


def test_weights_of_which_some_fit(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    adapter = _rewritten(new_adapter(1), tmp_path, name=lambda n: n.replace("layers.3.", "layers.9."))
    message = _refused(adapter, model_folder)
    assert message.startswith(
        "its file lacks the weights of 7 configured layers, the first is model.language_model.layers.3"
    )
    assert "one of the two has changed" in message, "it names this base model, so another is no advice"


def test_a_target_that_matches_less_than_the_file_holds(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    adapter = _rewritten(
        new_adapter(1), tmp_path, target_modules=["q_proj"], exclude_modules=".*vision_tower.*"
    )
    assert _refused(adapter, model_folder).startswith(
        "its file has 28 layers, and the model has 4 of them, not model.language_model.layers.0."
    )


def test_a_truncated_file_is_named_before_a_model_is_loaded(
    new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    file = Path(_rewritten(new_adapter(1), tmp_path)) / WEIGHTS
    whole = file.read_bytes()
    for size in (0, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"^{file}: damaged or truncated .* train it again$"):
            base_of_adapter(file.parent)


def test_targets_that_match_nothing(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    adapter = _rewritten(new_adapter(1), tmp_path, target_modules=["wqkv"])
    assert "wqkv" in _refused(adapter, model_folder)


def test_an_adapter_of_another_size(
    of_family: Callable[..., tuple[str, str, dict[str, torch.Tensor]]], model_folder: str
) -> None:
    _, adapter, _ = of_family("llava_siglip", ["language"])
    assert _refused(adapter, model_folder)


def test_an_untrained_adapter(load_model: Callable[..., Any], model_folder: str, tmp_path: Path) -> None:
    attach_lora(load_model(), LoraSettings()).save_pretrained(tmp_path / "fresh")
    assert _refused(str(tmp_path / "fresh"), model_folder) == "all its updates are zero: it was never trained"


def test_values_that_are_not_finite(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    adapter = _rewritten(
        new_adapter(1), tmp_path, weight=lambda n, w: w * float("nan") if "layers.2" in n else w
    )
    assert "NaN" in _refused(adapter, model_folder)


def test_updates_that_rounding_would_lose(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    adapter = _rewritten(new_adapter(1), tmp_path, weight=lambda n, w: w * 1e-7 if "lora_B" in n else w)
    assert merge_adapter(adapter, BaseModel(model_folder)).layers
    message = _refused(adapter, model_folder, "bfloat16")
    assert message.endswith("layers are too small for torch.bfloat16: merge in float32")


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0rubbish"])
def test_a_broken_file(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path, content: bytes
) -> None:
    adapter = _rewritten(new_adapter(1), tmp_path)
    (Path(adapter) / WEIGHTS).write_bytes(content)
    with pytest.raises(DataError, match=f"{adapter}/{WEIGHTS}: damaged or truncated"):
        merge_adapter(adapter, BaseModel(model_folder), "auto")


def test_other_adapters_than_lora(model_folder: str, load_model: Callable[..., Any], tmp_path: Path) -> None:
    from peft import IA3Config

    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(load_model(), config).save_pretrained(tmp_path / "ia3")
    assert _refused(str(tmp_path / "ia3"), model_folder) == "it is not a LoRA adapter"


def test_whole_modules_may_be_in_an_adapter(demo_model: str, prompts: PromptBatch, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["linear_1"])
    model = randomize_adapters(get_peft_model(load_base(BaseModel(demo_model)), config))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data *= 1.1
    model.save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(str(tmp_path / "adapter"), BaseModel(demo_model)).model
    expected = _logits(_adapted(demo_model, str(tmp_path / "adapter")), prompts.inputs)
    torch.testing.assert_close(_logits(merged, prompts.inputs), expected, **CLOSE)
    base = load_base(BaseModel(demo_model))
    for name in ("language_model.layers.0.self_attn.q_proj", "multi_modal_projector.linear_1"):
        weights = [m.get_parameter(f"model.{name}.weight") for m in (merged, base)]
        assert not torch.equal(*weights)


@pytest.mark.filterwarnings("ignore:.*ied.*embed|ie.*embed|.*embedding layers found")
def test_embeddings_that_are_tied_to_the_output_head(
    load_model: Callable[..., Any], model_folder: str, tmp_path: Path
) -> None:
    """An adapter changes one of the two modules, merging would change both."""
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    randomize_adapters(get_peft_model(load_model(), config)).save_pretrained(tmp_path / "adapter")
    message = _refused(str(tmp_path / "adapter"), model_folder)
    assert message == "it adapts model.language_model.embed_tokens, which shares its weights with lm_head"


def test_a_base_that_is_stored_quantised(
    model_folder: str, load_model: Callable[..., Any], new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForImageTextToText.from_pretrained(model_folder, quantization_config=config)
    model.save_pretrained(tmp_path / "quantised")
    with pytest.raises(DataError, match="quantised' is stored quantised, and nothing can be merged into it"):
        merge_adapter(new_adapter(1), BaseModel(str(tmp_path / "quantised")))


def test_a_missing_base_or_adapter_is_named(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"cannot load a model from '{tmp_path}/none'"):
        merge_adapter(new_adapter(1), BaseModel(str(tmp_path / "none")))
    with pytest.raises(DataError, match="no adapter at .*: train one first"):
        merge_adapter(str(tmp_path), BaseModel(model_folder))


# --- Written files --------------------------------------------------------------------------------------------------


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
    merged = merge_adapter(new_adapter(1), BaseModel(model_folder))

    def save(weights: dict[str, torch.Tensor], path: Path, metadata: Any) -> None:
        spoilt(weights, next(name for name in weights if "q_proj" in name))
        save_file(weights, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", save)
    with pytest.raises(DataError, match=message):
        save_merged(merged, tmp_path / "merged")


def test_what_cannot_be_written_is_an_error(
    model_folder: str, new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "merged").write_text("a file")
    with pytest.raises(DataError, match="cannot write the merged model: .*merged"):
        save_merged(merge_adapter(new_adapter(1), BaseModel(model_folder)), tmp_path / "merged")
