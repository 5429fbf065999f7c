"""Estimated memory of answers against the memory allocated when tiny models generate, score and rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_calibration.estimators.answer_scoring import right_padded
from vlm_calibration.estimators.cached import score_cached
from vlm_calibration.estimators.generating import GenerationRecorder
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.answer_memory import AnsweringStep, answering_peaks
from vlm_calibration.models.base import BaseModel
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.loading import empty_vlm
from vlm_calibration.models.memory import MemoryEstimate, estimate_answering
from vlm_calibration.models.shared_prefix import score_responses

from .families import FAMILIES, IMAGE, build, collated, new_prompts, words
from .steps import PLAIN, ROWS, allocated, saved

pytestmark = pytest.mark.slow

TOLERANCE = 0.15
"""As a share of the allocator's figure."""
NEW_TOKENS = 12
LEVELS = 11


def _prompts(family: str) -> tuple[dict[str, Any], int, int]:
    """Inputs of equally long prompts, their tokens, and the image's tokens."""
    [prompt] = new_prompts(family, 1)
    prompt = replace(prompt, ids=[*prompt.ids, *words(torch.Generator().manual_seed(0), 150)])
    inputs = collated([prompt] * ROWS)
    inputs["attention_mask"][0, 0] = 0  # prompts of a batch differ in length, so that the model builds a mask
    return inputs, len(prompt.ids), prompt.ids.count(IMAGE)


def _generate(model: Any, inputs: dict[str, Any], keep_cache: bool = False) -> GenerationRecorder:
    recorder = GenerationRecorder(model, keep_cache=keep_cache)
    recorder.generate(
        **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0
    )
    return recorder


def _estimate(
    model: Any, folder: Path, step: AnsweringStep, lora: LoraSettings | None = None
) -> MemoryEstimate:
    base = BaseModel(saved(unwrap_peft(model).config, folder), dtype="float32")
    return estimate_answering(base, step, lora=lora, adapters=int(lora is not None))


def _built(model: Any, folder: Path) -> Any:
    return empty_vlm(BaseModel(saved(model.config, folder))).eval()


def _activations(estimate: MemoryEstimate) -> int:
    """What a batch allocates beside its inputs."""
    return estimate.activations + estimate.cache


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_estimate_is_what_generation_takes(tmp_path: Path, family: str, adapted: bool) -> None:
    # In float32: on CPUs, attention in bfloat16 allocates buffers that GPUs do without.
    model = attach_lora(build(family), PLAIN).eval() if adapted else build(family)
    inputs, tokens, image = _prompts(family)
    _generate(model, inputs)
    peak = allocated(lambda: _generate(model, inputs))
    step = AnsweringStep(ROWS, tokens, NEW_TOKENS, image)
    estimate = _estimate(model, tmp_path, step, PLAIN if adapted else None)
    assert _activations(estimate) == pytest.approx(peak, rel=TOLERANCE)
    assert sum(estimate.weights.values()) == sum(p.nbytes for p in model.parameters())
    if family != "llava_onevision":  # whose images are padded to the largest number of tiles
        assert estimate.pixels == inputs["pixel_values"].nbytes


@pytest.mark.parametrize("family", ["llava_siglip", "smolvlm", "internvl"])
def test_an_estimate_is_what_scoring_from_the_cache_takes(tmp_path: Path, family: str) -> None:
    model = build(family)
    inputs, tokens, image = _prompts(family)
    cache = _generate(model, inputs, keep_cache=True).cache
    assert cache is not None
    responses = [[[*[7] * 60, 20 + level, 8] for level in range(LEVELS)]] * ROWS
    prompts = right_padded(inputs)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.key_values.layers)

    def score() -> None:
        with torch.no_grad():
            assert score_cached(model, cache, prompts, responses) is not None

    score()
    # Each layer's cache is replaced by a longer one, and the profiler does not see that the old one is freed.
    peak = allocated(score)
    step = AnsweringStep(ROWS, tokens, NEW_TOKENS, image, scored_tokens=1 + 60 + LEVELS)
    phases = answering_peaks(_built(model, tmp_path), step)
    assert phases.cache == pytest.approx(held, rel=0.05)
    assert phases.phases["scoring"] == pytest.approx(peak, rel=TOLERANCE)
    sampled = answering_peaks(_built(model, tmp_path), replace(step, sampled=True))
    assert sampled.phases["sampling"] == phases.cache + max(
        phases.phases["prompts"], phases.phases["new tokens"]
    )


@pytest.mark.parametrize("family", ["llava_siglip", "qwen2_5_vl", "smolvlm"])
def test_an_estimate_is_what_ranking_takes(tmp_path: Path, family: str) -> None:
    model = build(family)
    inputs, tokens, image = _prompts(family)
    inputs["attention_mask"][:] = 1
    responses = [[[9] * 40, [10] * 40]] * ROWS

    def rank() -> None:
        with torch.no_grad():
            score_responses(model, right_padded(inputs), responses)

    rank()
    peak = allocated(rank)
    step = AnsweringStep(ROWS, tokens, 0, image, ranked=(2, 40))
    estimate = _estimate(model, tmp_path, step)
    assert estimate.phase == "ranking"
    assert estimate.cache == 0
    assert _activations(estimate) == pytest.approx(peak, rel=TOLERANCE)


@pytest.mark.parametrize("family", ["llava_siglip", "qwen2_5_vl"])
def test_an_estimate_is_what_scoring_perturbed_copies_takes(tmp_path: Path, family: str) -> None:
    model = build(family)
    inputs, tokens, image = _prompts(family)
    inputs["attention_mask"][:] = 1
    responses = [[[9 + number] * NEW_TOKENS for number in range(3)]] * ROWS

    def score() -> None:
        with torch.no_grad():
            score_responses(model, right_padded(inputs), responses)

    score()
    peak = allocated(score)
    step = AnsweringStep(ROWS, tokens, NEW_TOKENS, image, scored_tokens=NEW_TOKENS, copied=(3, NEW_TOKENS))
    phases = answering_peaks(_built(model, tmp_path), step)
    # The keys and values of the answer are kept meanwhile.
    assert phases.phases["perturbed copies"] - phases.cache == pytest.approx(peak, rel=TOLERANCE)
    estimate = _estimate(model, tmp_path, step)
    alone = _estimate(model, tmp_path, replace(step, copied=None))
    assert estimate.pixels == 2 * alone.pixels
    assert estimate.total > alone.total


def test_adapters_and_systems_add_up(tmp_path: Path) -> None:
    model = build("llava_siglip")
    step = AnsweringStep(2, 40, 8, 16)
    none, one, three = (
        estimate_answering(
            BaseModel(saved(model.config, tmp_path)), step, lora=PLAIN if n else None, adapters=n
        )
        for n in (0, 1, 3)
    )
    adapter = one.parameters - none.parameters
    assert three.parameters - one.parameters == 2 * adapter
    assert three.weights["float32"] - one.weights["float32"] == 2 * 4 * adapter
    several = estimate_answering(BaseModel(saved(model.config, tmp_path)), replace(step, systems=3))
    assert several.total > none.total, "the tower's result is kept"


def test_quantised_weights_keep_the_others_dtype(tmp_path: Path) -> None:
    """Only training converts weights that are not quantised to float32."""
    base = BaseModel(saved(build("qwen2_5_vl").config, tmp_path), dtype="bfloat16", quantization="int8")
    answering = estimate_answering(base, AnsweringStep(1, 20, 4))
    training = estimate_answering(base, AnsweringStep(1, 20, 4), training=True)
    assert set(answering.weights) == {"int8", "bfloat16"}
    assert training.weights == {
        "int8": answering.weights["int8"],
        "float32": 2 * answering.weights["bfloat16"],
    }
