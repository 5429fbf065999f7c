"""Estimated activations against the memory allocated in real steps of tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_calibration.losses.sequence import token_log_likelihood
from vlm_calibration.models.activations import TrainingStep
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.fake_tensors import LiveBytes
from vlm_calibration.models.forward import labelled_logits
from vlm_calibration.models.image_tokens import patches_per_token
from vlm_calibration.models.loading import BaseModel
from vlm_calibration.models.memory import estimate_memory
from vlm_calibration.models.vision_memory import adapter_parts

from .families import FAMILIES, IMAGE, build, collated, new_prompts
from .published import MODELS
from .steps import BF16, PLAIN, ROWS, TOLERANCE, allocated, labels_of, saved, train_step


def _real(family: str, lora: LoraSettings, step: TrainingStep) -> tuple[Any, dict[str, Any], int]:
    """An adapted model, its inputs, and the peak memory of a full step: image, language model, loss, backward."""
    model = build(family, dtype=BF16 if step.autocast else torch.float32)
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = attach_lora(model, lora).train()
    inputs = collated(new_prompts(family, ROWS), model.dtype)
    labels = labels_of(inputs["input_ids"])

    def run() -> None:
        train_step(model, inputs, labels, step.autocast)

    run()
    return model, inputs, allocated(run)


def _step(family: str, **settings: Any) -> TrainingStep:
    prompts = new_prompts(family, ROWS)
    longest = max(len(p.ids) for p in prompts)
    images = sum(p.ids.count(IMAGE) for p in prompts) // ROWS
    return TrainingStep(batch=ROWS, tokens=longest, image_tokens=images, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_estimate_is_what_training_takes(tmp_path: Path, family: str, checkpointing: bool) -> None:
    step = _step(family, checkpointing=checkpointing)
    model, inputs, peak = _real(family, PLAIN, step)
    estimate = estimate_memory(
        BaseModel(saved(model.get_base_model().config, tmp_path), dtype="bfloat16"), PLAIN, step
    )
    assert inputs["input_ids"].shape == (step.batch, step.row)
    assert estimate.activations == pytest.approx(peak, rel=TOLERANCE)
    assert 0 < estimate.logits < estimate.activations
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    assert estimate.parameters == sum(p.numel() for p in parameters)
    assert estimate.trained == sum(p.numel() for p in trained)
    assert estimate.gradients == sum(p.grad.nbytes for p in trained)
    for dtype in (BF16, torch.float32):
        expected = sum(p.nbytes for p in parameters if p.dtype == dtype)
        assert estimate.weights[str(dtype).removeprefix("torch.")] == expected


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl", "internvl", "smolvlm", "gemma3"])
def test_an_adapted_tower_keeps_activations(tmp_path: Path, family: str, checkpointing: bool) -> None:
    lora = LoraSettings(dropout=0.0, parts=["language", "tower"])
    step = _step(family, checkpointing=checkpointing)
    model, _, peak = _real(family, lora, step)
    base = BaseModel(saved(model.get_base_model().config, tmp_path), dtype="bfloat16")
    estimate = estimate_memory(base, lora, step)
    assert estimate.activations == pytest.approx(peak, rel=TOLERANCE)
    assert estimate.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    alone = estimate_memory(base, PLAIN, step)
    assert estimate.activations > alone.activations, "a frozen tower saves no activations"


def test_without_mixed_precision(tmp_path: Path) -> None:
    step = _step("llava_siglip", autocast=None)
    model, _, peak = _real("llava_siglip", PLAIN, step)
    base = BaseModel(saved(model.get_base_model().config, tmp_path), dtype="float32")
    assert estimate_memory(base, PLAIN, step).activations == pytest.approx(peak, rel=TOLERANCE)
    half = TrainingStep(batch=2, tokens=20, autocast=None, cast=BF16)
    cast = estimate_memory(base, PLAIN, half)
    assert list(cast.weights) == ["bfloat16"]
    assert cast.gradients == 2 * cast.trained


def test_live_bytes_are_those_that_autograd_keeps() -> None:
    """Compare with the bytes of the tensors that autograd saves by the end of the forward pass."""
    model = attach_lora(build("llava_siglip"), PLAIN).train()
    inputs = collated(new_prompts("llava_siglip", ROWS))
    labels = labels_of(inputs["input_ids"])
    existing = [*model.parameters(), *model.buffers(), *inputs.values(), labels]
    sizes = {t.untyped_storage()._cdata: 0 for t in existing}
    tensors = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if sizes.setdefault(storage._cdata, storage.nbytes()):
            tensors.append(tensor)
        return tensor

    with LiveBytes(existing) as live, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logits = labelled_logits(model, inputs, labels).logits
        loss = token_log_likelihood(logits, torch.zeros(len(logits), dtype=torch.int64)).sum()
    assert sum(sizes.values()) == pytest.approx(live.now, rel=0.02)
    tensors.clear()
    loss.backward()
    del logits, loss
    assert live.now == 0, "all counted bytes are freed"


@pytest.mark.slow
def test_dropout_keeps_a_byte_a_number(model_folder: str) -> None:
    """As on GPUs: only a mask for the input of each adapted layer."""
    without, with_ = (
        estimate_memory(BaseModel(model_folder), LoraSettings(dropout=p), TrainingStep(4, 90))
        for p in (0.0, 0.1)
    )
    inputs = 4 * 90 * 4 * (6 * 128 + 352)  # rows x tokens x layers x (q, k, v, o, gate, up; down)
    masks = with_.activations - without.activations
    assert masks == pytest.approx(inputs, rel=0.15)


@pytest.mark.slow
def test_the_worst_kind_of_attention(model_folder: str) -> None:
    """Eager attention saves the attention weights of all pairs of tokens."""
    sdpa, eager = (
        estimate_memory(BaseModel(model_folder, attn_implementation=name), PLAIN, TrainingStep(2, 500))
        for name in (None, "eager")
    )
    assert eager.activations - sdpa.activations > 2 * 4 * 4 * 500**2 * 4


@pytest.mark.slow
def test_flex_attention_takes_no_dense_mask(model_folder: str) -> None:
    sdpa, flex = (
        estimate_memory(
            BaseModel(model_folder, attn_implementation=name), PLAIN, TrainingStep(2, 1900, responses=8)
        )
        for name in ("sdpa", "flex_attention")
    )
    row = 1900 + 7 * 16
    dense = 2 * row**2 * 4
    assert sdpa.logits == flex.logits
    assert sdpa.activations - flex.activations > 0.98 * dense


def test_parts_of_adapters(load_model: Callable[..., Any]) -> None:
    model = attach_lora(load_model(), LoraSettings(parts=["language", "projector"]))
    parts = adapter_parts(model)
    assert set(parts) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(parts.values()) == {"language", "projector"}
    assert all(("projector" in name) == (part == "projector") for name, part in parts.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smolvlm2_256m", 16),
        ("smolvlm2_2_2b", 9),
        ("qwen2_5_vl_7b", 4),
        ("qwen3_vl_4b", 4),
        ("internvl3_2b", 4),
        ("llava_1_5_7b", 1),
        ("gemma3_4b", 16),
        ("paligemma2_3b", 1),
    ],
)
def test_patches_of_a_token(name: str, expected: int) -> None:
    assert patches_per_token(MODELS[name].config()) == expected
