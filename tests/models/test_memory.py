"""The memory estimate against what the allocator hands out in real steps, and against published sizes."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.profiler import ProfilerActivity, profile

from vlm_calibration.losses.sequence import IGNORE, token_log_likelihood
from vlm_calibration.models.activations import (
    RESPONSE_TOKENS,
    LiveBytes,
    TrainingStep,
    part_of_adapters,
    patches_per_token,
)
from vlm_calibration.models.adapters import LoraSettings, attach_lora, continue_adapter
from vlm_calibration.models.forward import labelled_logits
from vlm_calibration.models.loading import BaseModel, load_for_training
from vlm_calibration.models.memory import MemoryEstimate, estimate_memory, quantised_bytes
from vlm_calibration.records import DataError

from .families import FAMILIES, IMAGE, build, collated, new_prompts
from .published import MODELS

TOLERANCE = 0.1
"""Of the activations' peak, as a share of what the allocator saw; deviations are at most 7%."""
PLAIN = LoraSettings(dropout=0.0)
"""CPUs keep another kind of mask for dropout than GPUs, which are what is estimated."""
ROWS = 24
BF16 = torch.bfloat16


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], str]:
    """Writes a configuration to a folder, as all that an estimate needs of a model."""

    def save(config: Any) -> str:
        config.save_pretrained(tmp_path / "config")
        return str(tmp_path / "config")

    return save


def _train(model: Any, inputs: dict[str, Any], labels: torch.Tensor, autocast: Any) -> None:
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        found = labelled_logits(model, inputs, labels)
        loss = -token_log_likelihood(found.logits, found.targets).sum()
    del found
    loss.backward()


def _labels(ids: torch.Tensor) -> torch.Tensor:
    labels = torch.full_like(ids, IGNORE)
    labels[:, -RESPONSE_TOKENS:] = 5
    return labels


def allocated(run: Callable[[], None]) -> int:
    """The most bytes that a run has from the allocator at any moment, without those that it found there.

    The run must have been run before: it is to find its gradients there.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _real(family: str, lora: LoraSettings, step: TrainingStep) -> tuple[Any, dict[str, Any], int]:
    """An adapted model, its inputs, and the peak of a step through the full path: image, language model, loss, backward."""
    model = build(family, dtype=BF16 if step.autocast else torch.float32)
    if step.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = attach_lora(model, lora).train()
    inputs = collated(new_prompts(family, ROWS), model.dtype)
    labels = _labels(inputs["input_ids"])

    def run() -> None:
        _train(model, inputs, labels, step.autocast)

    run()
    return model, inputs, allocated(run)


def _step(family: str, **settings: Any) -> TrainingStep:
    prompts = new_prompts(family, ROWS)
    longest = max(len(p.ids) for p in prompts)
    images = sum(p.ids.count(IMAGE) for p in prompts) // ROWS
    return TrainingStep(batch=ROWS, tokens=longest, image_tokens=images, **settings)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_estimate_is_what_training_takes(
    saved: Callable[[Any], str], family: str, checkpointing: bool
) -> None:
    step = _step(family, checkpointing=checkpointing)
    model, inputs, peak = _real(family, PLAIN, step)
    estimate = estimate_memory(BaseModel(saved(model.get_base_model().config), dtype="bfloat16"), PLAIN, step)
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl", "internvl", "smolvlm", "gemma3"])
def test_an_adapted_tower_keeps_activations(
    saved: Callable[[Any], str], family: str, checkpointing: bool
) -> None:
    lora = LoraSettings(dropout=0.0, parts=["language", "tower"])
    step = _step(family, checkpointing=checkpointing)
    model, _, peak = _real(family, lora, step)
    base = BaseModel(saved(model.get_base_model().config), dtype="bfloat16")
    estimate = estimate_memory(base, lora, step)
    assert estimate.activations == pytest.approx(peak, rel=TOLERANCE)
    assert estimate.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    alone = estimate_memory(base, PLAIN, step)
    assert estimate.activations > alone.activations, "and a frozen one none"


def test_without_mixed_precision(saved: Callable[[Any], str]) -> None:
    step = _step("llava_siglip", autocast=None)
    model, _, peak = _real("llava_siglip", PLAIN, step)
    base = BaseModel(saved(model.get_base_model().config), dtype="float32")
    assert estimate_memory(base, PLAIN, step).activations == pytest.approx(peak, rel=TOLERANCE)
    half = TrainingStep(batch=2, tokens=20, autocast=None, cast=BF16)
    cast = estimate_memory(base, PLAIN, half)
    assert list(cast.weights) == ["bfloat16"]
    assert cast.gradients == 2 * cast.trained


def test_live_bytes_are_those_that_autograd_keeps() -> None:
    """At the end of the forward pass, counted in another way: by the tensors that autograd saves."""
    model = attach_lora(build("llava_siglip"), PLAIN).train()
    inputs = collated(new_prompts("llava_siglip", ROWS))
    labels = _labels(inputs["input_ids"])
    found = [*model.parameters(), *model.buffers(), *inputs.values(), labels]
    kept = {t.untyped_storage()._cdata: 0 for t in found}
    tensors = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if kept.setdefault(storage._cdata, storage.nbytes()):
            tensors.append(tensor)
        return tensor

    with LiveBytes(found) as live, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logits = labelled_logits(model, inputs, labels).logits
        loss = token_log_likelihood(logits, torch.zeros(len(logits), dtype=torch.int64)).sum()
    assert sum(kept.values()) == pytest.approx(live.now, rel=0.02)
    tensors.clear()
    loss.backward()
    del logits, loss
    assert live.now == 0, "all that was counted is given back"


# --- Quantised weights --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaVA whose language model has layers of multiples of 64, as 4-bit blocks need."""
    text = tf.LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        pad_token_id=0,
    )
    vision = tf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    config = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=16
    )
    folder = tmp_path_factory.mktemp("wide")
    tf.LlavaForConditionalGeneration(config).to(BF16).save_pretrained(folder)
    return str(folder)


def _stored(model: Any) -> Iterator[tuple[str, int]]:
    """Kind and bytes of every weight, with the scales of quantised ones and without their constant tables."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield "nf4", parameter.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        elif parameter.dtype == torch.int8:
            yield "int8", parameter.nbytes + parameter.SCB.nbytes
        else:
            yield str(parameter.dtype).removeprefix("torch."), parameter.nbytes


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_weights_take_what_quantised_ones_take(wide_folder: str, quantization: Any) -> None:
    base = BaseModel(wide_folder, dtype="bfloat16", quantization=quantization)
    expected: dict[str, int] = {}
    for kind, size in _stored(attach_lora(load_for_training(base, False), PLAIN)):
        expected[kind] = expected.get(kind, 0) + size
    assert estimate_memory(base, PLAIN, TrainingStep(1, 20)).weights == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_qlora_takes_what_is_estimated(wide_folder: str, checkpointing: bool) -> None:
    base = BaseModel(wide_folder, dtype="bfloat16", quantization="nf4")
    model = attach_lora(load_for_training(base, checkpointing), PLAIN).train()
    ids = torch.full((ROWS, 150), 5)
    ids[:, 1:17] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, 140:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(ROWS, 3, 16, 16)}

    def run() -> None:
        _train(model, inputs, _labels(ids), BF16)

    run()
    step = TrainingStep(ROWS, 150, checkpointing=checkpointing)
    assert estimate_memory(base, PLAIN, step).activations == pytest.approx(allocated(run), rel=TOLERANCE)


def test_int8_keeps_inputs_even_under_checkpointing(wide_folder: str) -> None:
    step = TrainingStep(8, 100, checkpointing=True)
    nf4, int8 = (
        estimate_memory(BaseModel(wide_folder, dtype="bfloat16", quantization=q), PLAIN, step)
        for q in ("nf4", "int8")
    )
    inputs = (
        (4 * 128 + 192) * 4 * 800 * 3
    )  # q, k and v have one input, o, gate and up, down; float32, three layers
    assert int8.activations - nf4.activations == pytest.approx(inputs, rel=0.4)


def test_quantised_bytes() -> None:
    assert quantised_bytes((64, 256), "nf4") == 64 * 256 // 2 + 256 + 4
    assert quantised_bytes((64, 257), "nf4") == 64 * 257 // 2 + 257 + 2 * 4
    assert quantised_bytes((64, 256), "int8") == 64 * 256 + 64 * 4


# --- What is asked for --------------------------------------------------------------------------------------------


def _estimate(folder: str, lora: LoraSettings = PLAIN, **settings: Any) -> MemoryEstimate:
    step = {n: settings.pop(n) for n in ("batch", "tokens", "responses", "checkpointing") if n in settings}
    return estimate_memory(
        BaseModel(folder, dtype="float32"),
        lora,
        TrainingStep(**{"batch": 4, "tokens": 90, **step}),
        **settings,
    )


def test_a_reference_is_a_second_adapter(model_folder: str, new_adapter: Callable[..., str]) -> None:
    lora = LoraSettings(r=4, alpha=8, dropout=0.0, parts=["language", "projector"])
    real = continue_adapter(
        load_for_training(BaseModel(model_folder), False), new_adapter(1, parts=lora.parts), ["language"]
    )
    found = _estimate(model_folder, lora, reference=True, trained=["language"])
    assert found.parameters == sum(p.numel() for p in real.parameters())
    assert found.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.weights == {"float32": sum(p.nbytes for p in real.parameters())}
    alone = _estimate(model_folder, lora)
    assert alone.trained > found.trained
    assert alone.parameters < found.parameters


def test_responses_make_a_row_longer(model_folder: str) -> None:
    step = TrainingStep(4, 90, responses=11)
    assert (step.row, step.labels) == (90 + 10 * RESPONSE_TOKENS, 11 * RESPONSE_TOKENS)
    one, many = (_estimate(model_folder, responses=n) for n in (1, 11))
    longer = _estimate(model_folder, tokens=step.row)
    assert one.activations < longer.activations <= many.activations
    assert many.logits > 8 * one.logits


def test_more_of_anything_takes_more(model_folder: str) -> None:
    base = _estimate(model_folder)
    assert _estimate(model_folder, batch=8).activations == pytest.approx(2 * base.activations, rel=0.1)
    assert _estimate(model_folder, checkpointing=True).activations < base.activations
    assert _estimate(model_folder, LoraSettings(dropout=0.1)).activations > base.activations
    assert _estimate(model_folder, LoraSettings(r=32, dropout=0.0)).trained == 2 * base.trained
    assert _estimate(model_folder, optimizer_bytes=2).optimizer == 2 * base.trained
    assert base.optimizer == 8 * base.trained
    assert base.total == sum(base.weights.values()) + base.gradients + base.optimizer + base.activations


def test_dropout_keeps_a_byte_a_number(model_folder: str) -> None:
    """As on GPUs: a mask for the input of each adapted layer, and nothing more."""
    without, with_ = (_estimate(model_folder, LoraSettings(dropout=p)) for p in (0.0, 0.1))
    inputs = 4 * 90 * 4 * (6 * 128 + 352)  # rows x tokens x layers x (q, k, v, o, gate, up; down)
    masks = with_.activations - without.activations
    assert masks == pytest.approx(inputs, rel=0.15)


def test_the_worst_kind_of_attention(model_folder: str) -> None:
    """Eager attention keeps the attention of every token to every other."""
    sdpa, eager = (
        estimate_memory(BaseModel(model_folder, attn_implementation=name), PLAIN, TrainingStep(2, 500))
        for name in (None, "eager")
    )
    assert eager.activations - sdpa.activations > 2 * 4 * 4 * 500**2 * 4


@pytest.mark.parametrize(
    ("base", "lora", "says"),
    [
        (BaseModel("no/model"), PLAIN, "cannot find the model 'no/model': "),
        (BaseModel("{tmp}"), PLAIN, "cannot find the model '{tmp}'"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, base: BaseModel, lora: LoraSettings, says: str) -> None:
    with pytest.raises(DataError) as caught:
        estimate_memory(BaseModel(base.name_or_path.format(tmp=tmp_path)), lora, TrainingStep(1, 10))
    assert str(caught.value).startswith(says.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


def test_parts_of_adapters(load_model: Callable[..., Any]) -> None:
    model = attach_lora(load_model(), LoraSettings(parts=["language", "projector"]))
    parts = part_of_adapters(model)
    assert set(parts) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(parts.values()) == {"language", "projector"}
    assert all(("projector" in name) == (part == "projector") for name, part in parts.items())


# --- Published models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = tf.AutoModelForImageTextToText.from_config(MODELS[name].config())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(MODELS[name].parameters, rel=0.005)


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


def test_seven_billion_parameters_without_the_memory_for_them(saved: Callable[[Any], str]) -> None:
    folder = saved(MODELS["qwen2_5_vl_7b"].config())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = TrainingStep(2, 4096, checkpointing=True)
    estimate = estimate_memory(BaseModel(folder, dtype="bfloat16"), LoraSettings(), step)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024, "KiB"
    assert estimate.weights["bfloat16"] == pytest.approx(2 * 8.29e9, rel=0.001)
    assert 20 < estimate.total / 2**30 < 24
