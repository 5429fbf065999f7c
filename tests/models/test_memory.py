"""The memory estimate: quantised weights against loaded ones, effects of settings, and published models."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from vlm_calibration.models.activations import RESPONSE_TOKENS, TrainingStep
from vlm_calibration.models.adapters import LoraSettings, attach_lora, continue_adapter
from vlm_calibration.models.loading import BaseModel, load_for_training
from vlm_calibration.models.memory import MemoryEstimate, estimate_memory, quantised_bytes
from vlm_calibration.records import DataError

from .families import IMAGE
from .published import MODELS
from .steps import BF16, PLAIN, ROWS, TOLERANCE, allocated, labels_of, saved, train_step

pytestmark = pytest.mark.slow

# --- Quantised weights ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaVA whose language model has widths that are multiples of 64, as required by nf4."""
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
    """Kind and bytes of every weight, including quantisation scales without constant tables."""
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
    for kind, size in _stored(attach_lora(load_for_training(base), PLAIN)):
        expected[kind] = expected.get(kind, 0) + size
    assert estimate_memory(base, PLAIN, TrainingStep(1, 20)).weights == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_qlora_takes_what_is_estimated(wide_folder: str, checkpointing: bool) -> None:
    base = BaseModel(wide_folder, dtype="bfloat16", quantization="nf4")
    model = attach_lora(load_for_training(base), PLAIN).train()
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.full((ROWS, 150), 5)
    ids[:, 1:17] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, 140:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(ROWS, 3, 16, 16)}

    def run() -> None:
        train_step(model, inputs, labels_of(ids), BF16)

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


# --- Settings -------------------------------------------------------------------------------------------------------


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
        load_for_training(BaseModel(model_folder)), new_adapter(1, parts=lora.parts), ["language"]
    )
    estimate = _estimate(model_folder, lora, reference=True, trained=["language"])
    assert estimate.parameters == sum(p.numel() for p in real.parameters())
    assert estimate.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert estimate.weights == {"float32": sum(p.nbytes for p in real.parameters())}
    alone = _estimate(model_folder, lora)
    assert alone.trained > estimate.trained
    assert alone.parameters < estimate.parameters


def test_responses_make_a_row_longer(model_folder: str) -> None:
    step = TrainingStep(4, 90, responses=11)
    assert (step.row, step.labels) == (90 + 10 * RESPONSE_TOKENS, 11 * RESPONSE_TOKENS)
    single, listwise = (_estimate(model_folder, responses=n) for n in (1, 11))
    longer = _estimate(model_folder, tokens=step.row)
    assert single.activations < longer.activations <= listwise.activations
    assert listwise.logits > 8 * single.logits


def test_more_of_anything_takes_more(model_folder: str) -> None:
    base = _estimate(model_folder)
    assert _estimate(model_folder, batch=8).activations == pytest.approx(2 * base.activations, rel=0.1)
    assert _estimate(model_folder, checkpointing=True).activations < base.activations
    assert _estimate(model_folder, LoraSettings(dropout=0.1)).activations > base.activations
    assert _estimate(model_folder, LoraSettings(r=32, dropout=0.0)).trained == 2 * base.trained
    assert _estimate(model_folder, optimizer_bytes=2).optimizer == 2 * base.trained
    assert base.optimizer == 8 * base.trained
    held = base.gradients + base.optimizer + base.pixels
    assert base.total == sum(base.weights.values()) + held + base.activations


@pytest.mark.parametrize(
    ("base", "lora", "message"),
    [
        (BaseModel("no/model"), PLAIN, "cannot load a model from 'no/model': "),
        (BaseModel("{tmp}"), PLAIN, "cannot load a model from '{tmp}'"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, base: BaseModel, lora: LoraSettings, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        estimate_memory(BaseModel(base.name_or_path.format(tmp=tmp_path)), lora, TrainingStep(1, 10))
    assert str(caught.value).startswith(message.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


# --- Published models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = tf.AutoModelForImageTextToText.from_config(MODELS[name].config())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(MODELS[name].parameters, rel=0.005)


def test_seven_billion_parameters_without_the_memory_for_them(tmp_path: Path) -> None:
    folder = saved(MODELS["qwen2_5_vl_7b"].config(), tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = TrainingStep(2, 4096, checkpointing=True)
    estimate = estimate_memory(BaseModel(folder, dtype="bfloat16"), LoraSettings(), step)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024, "KiB"
    assert estimate.weights["bfloat16"] == pytest.approx(2 * 8.29e9, rel=0.001)
    assert 20 < estimate.total / 2**30 < 24
