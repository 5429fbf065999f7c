"""LoRA adapters: the adapted layers, several adapters on one base, and loading with peft alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from peft import PeftModel

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.data.module import load_processor
from vlm_calibration.models.adapters import (
    REFERENCE,
    LoraSettings,
    adapted_parts,
    attach_lora,
    continue_adapter,
    layer_parts,
    load_adapters,
    using_adapter,
)
from vlm_calibration.models.base import ADAPTER, DEMO_MODEL, base_of_adapters
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.records import DataError

NAMES = {
    "language": (
        "model.language_model.layers.{}.",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
    "tower": (
        "model.vision_tower.encoder.layers.{}.",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        ("mlp.fc1", "mlp.fc2"),
    ),
    "projector": ("model.multi_modal_projector.linear_{}", ("",), ()),
}


def _expected(part: str) -> set[str]:
    stem, *groups = NAMES[part]
    numbers = (1, 2) if part == "projector" else range(4)
    return {stem.format(i) + name for i in numbers for group in groups for name in group}


def _logits(model: Any, prompts: PromptBatch) -> torch.Tensor:
    with torch.no_grad():
        return model(**prompts.inputs).logits[:, -1]


def test_every_linear_layer_is_in_one_part(load_model: Callable[..., Any]) -> None:
    parts = layer_parts(load_model())
    for part in NAMES:
        assert {name for name, p in parts.items() if p == part} == _expected(part)
    assert len(parts) == sum(len(_expected(part)) for part in NAMES)


@pytest.mark.parametrize("parts", [["language"], ["projector", "tower"]])
def test_adapters_go_where_they_are_asked_to(load_model: Callable[..., Any], parts: list[Any]) -> None:
    settings = LoraSettings(r=3, alpha=12, dropout=0.25, parts=parts, use_rslora=True, use_dora=True)
    model = attach_lora(load_model(), settings)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (3, 12, 0.25, True)
    scaling = next(m for m in model.modules() if hasattr(m, "lora_A")).scaling["default"]
    assert scaling == pytest.approx(12 / 3**0.5)
    adapted = {name for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert adapted == set().union(*(_expected(p) for p in parts))
    assert adapted_parts(model) == parts
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_a_part_without_layers_is_named(
    load_model: Callable[..., Any], new_adapter: Callable[..., str], tmp_path: Path
) -> None:
    folder = new_adapter(1, parts=["language"])
    with pytest.raises(DataError, match=f"the adapter at {folder} has no layer in tower, projector"):
        continue_adapter(load_model(), folder, ["tower", "projector"])
    with pytest.raises(DataError, match="no adapter at .*: train one first"):
        continue_adapter(load_model(), str(tmp_path))
    model = load_model()
    model.model.multi_modal_projector = torch.nn.Identity()
    with pytest.raises(DataError, match="LlavaForConditionalGeneration has no linear layer in its projector"):
        attach_lora(model, LoraSettings(parts=["language", "projector"]))
    # No adapters at all: the model itself.
    assert load_adapters(model, {}) is model
    with using_adapter(model, None):
        pass
    with pytest.raises(ValueError, match="the model has no adapter 'sft'"), using_adapter(model, "sft"):
        pass


# --- Policy and reference ---

ALL_PARTS = ["language", "tower", "projector"]


@pytest.fixture(scope="module")
def of_all_parts(new_adapter: Callable[..., str]) -> str:
    return new_adapter(1, parts=ALL_PARTS)


def _state(model: PeftModel) -> tuple[str, list[str], set[bool], set[str]]:
    """Active adapters of peft's wrapper and layers, disabled flags, and trained parameters."""
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    active = sorted({name for layer in layers for name in layer.active_adapters})
    disabled = {layer.disable_adapters for layer in layers}
    return model.active_adapter, active, disabled, {n for n, p in model.named_parameters() if p.requires_grad}


def _logits_of_each(model: PeftModel, prompts: PromptBatch) -> dict[str | None, torch.Tensor]:
    """Adapter, None for the base model -> logits."""
    logits: dict[str | None, torch.Tensor] = {}
    for name in ("default", REFERENCE, None):
        with using_adapter(model, name):
            logits[name] = _logits(model, prompts)
    return logits


def _train(model: PeftModel, prompts: PromptBatch, steps: int = 3) -> None:
    """Train away from the reference, which runs in each step as in preference optimisation."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        with using_adapter(model, REFERENCE):
            reference = _logits(model, prompts)
        loss = -(model(**prompts.inputs).logits[:, -1] - reference).abs().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_a_policy_starts_as_its_reference_without_dropout(
    load_model: Callable[..., Any], new_adapter: Callable[..., str], prompts: PromptBatch, settings: Any
) -> None:
    folder, base = new_adapter(1, parts=ALL_PARTS, dropout=0.5, **settings), load_model()
    plain, pointers = _logits(base, prompts), {p.data_ptr() for p in base.parameters()}
    policy = continue_adapter(base, folder).eval()
    parameters = list(policy.named_parameters(remove_duplicate=False))
    assert {p.data_ptr() for name, p in parameters if "lora_" not in name} == pointers, "one copy of the base"
    adapters = [p.data_ptr() for name, p in parameters if "lora_" in name]
    assert len(set(adapters)) == len(adapters)
    # Not bit-identical: the order of a sum may depend on a weight's address.
    expected = _logits(PeftModel.from_pretrained(load_model(), folder).eval(), prompts)
    assert torch.allclose(_logits(policy, prompts), expected, atol=1e-5)
    policy.train()
    assert sorted(policy.peft_config) == ["default", REFERENCE]
    for name in policy.peft_config:
        with using_adapter(policy, name):
            assert torch.allclose(_logits(policy, prompts), expected, atol=1e-5)
        assert policy.peft_config[name].lora_dropout == 0
    with using_adapter(policy, None):
        assert torch.allclose(_logits(policy.eval(), prompts), plain, atol=1e-5)
    assert list(continue_adapter(load_model(), folder, reference=False).peft_config) == ["default"]


@pytest.mark.parametrize("parts", [None, ["language"], ["tower", "projector"]])
def test_only_the_given_parts_of_the_policy_are_trained(
    load_model: Callable[..., Any], of_all_parts: str, prompts: PromptBatch, parts: list[Any] | None
) -> None:
    model = continue_adapter(load_model(), of_all_parts, parts).eval()
    layers = set().union(*(_expected(part) for part in parts or NAMES))
    trained = {f"base_model.model.{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    weights, before = {n: p.clone() for n, p in model.named_parameters()}, _logits_of_each(model, prompts)
    _train(model, prompts)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])} == trained
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    after = _logits_of_each(model, prompts)
    assert not torch.allclose(after["default"], before["default"], atol=0.01)
    assert all(torch.equal(after[name], before[name]) for name in (REFERENCE, None))


@pytest.mark.parametrize("parts", [None, ["language"]], ids=["all", "language"])
def test_adapters_may_be_nested_and_what_is_active_and_trained_is_restored(
    load_model: Callable[..., Any], of_all_parts: str, prompts: PromptBatch, parts: list[Any] | None
) -> None:
    model = continue_adapter(load_model(), of_all_parts, parts).eval()
    _train(model, prompts, 1)
    expected, before = _logits_of_each(model, prompts), _state(model)
    assert before[:3] == ("default", ["default"], {False})
    for outer, inner in product(expected, repeat=2):
        with using_adapter(model, outer):
            trained = [n for n, p in model.named_parameters() if p.requires_grad]
            assert not [n for n in trained if REFERENCE in n], "the reference is never trained"
            with pytest.raises(RuntimeError, match="stop"), using_adapter(model, inner):
                assert torch.equal(_logits(model, prompts), expected[inner]), (outer, inner)
                raise RuntimeError("stop")
            assert torch.equal(_logits(model, prompts), expected[outer]), (outer, inner)
        assert _state(model) == before
    with pytest.raises(ValueError, match="none_such"), using_adapter(model, "none_such"):
        pass
    assert _state(model) == before


# --- Loading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("{tmp}", {}, "cannot load a model from '{tmp}': "),
        ("{tmp}/none", {}, "cannot load a model from '{tmp}/none': there is no such folder"),
        ("{model}", {"attn_implementation": "none_such"}, "cannot load a model from '{model}': "),
        (
            "{model}",
            {"quantization": "nf4"},
            "{model}: nf4 needs layers with a multiple of 64 inputs, model.lang",
        ),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named(
    model_folder: str, tmp_path: Path, name: str, settings: dict[str, Any], says: str
) -> None:
    places = {"tmp": tmp_path, "model": model_folder}
    with pytest.raises(DataError) as caught:
        load_base(BaseModel(name.format(**places), **settings))
    assert str(caught.value).startswith(says.format(**places))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "quantization", "expected"),
    [
        ("auto", "none", {torch.float32}),
        ("bfloat16", "none", {torch.bfloat16}),
        ("float32", "int8", {torch.float32, torch.int8}),
    ],
)
def test_a_model_has_its_kernel_dtype_and_quantization_in_eval_mode(
    model_folder: str, dtype: Any, quantization: Any, expected: set[torch.dtype]
) -> None:
    model = load_base(BaseModel(model_folder, dtype, quantization, "eager"))
    assert not model.training
    assert model.config._attn_implementation == "eager"
    kind = Linear8bitLt if quantization == "int8" else torch.nn.Linear
    for name, part in layer_parts(model).items():
        assert type(model.get_submodule(name)) is (kind if part == "language" else torch.nn.Linear), name
    assert {p.dtype for p in model.parameters()} == expected


def test_an_adapter_names_a_folder_for_every_working_folder(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(model_folder).parent)
    model = load_base(BaseModel(Path(model_folder).name))
    attach_lora(model, LoraSettings(r=2)).save_pretrained(tmp_path / ADAPTER)
    monkeypatch.chdir(tmp_path)
    base = base_of_adapters({"sft": str(tmp_path)})
    assert base.name_or_path == model_folder
    load_processor(base.name_or_path)


@pytest.mark.parametrize(
    ("name", "located"),
    [
        ("src/vlm_calibration/demo/model", str(DEMO_MODEL)),
        ("/gone/site-packages/vlm_calibration/demo/model", str(DEMO_MODEL)),
        ("owner/model", "owner/model"),
        ("no/such/demo/model", "no/such/demo/model"),
    ],
)
def test_the_demo_s_model_of_another_checkout_or_installation_is_this_one_s_unless_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, located: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert BaseModel(name).name_or_path == located
    if located == str(DEMO_MODEL) and not name.startswith("/"):
        (tmp_path / name).mkdir(parents=True)
        assert BaseModel(name).name_or_path == str(tmp_path / name)
