"""Stability: against perturbing and scoring one image at a time; copies from the data module; what it costs and refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vlm_calibration.data.collate import ChatFormat, PromptBatch
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import DataNeeds, PerturbedQueryDataModule
from vlm_calibration.data.noise import ImageCopy, NoisePolicy, perturbed_copies, query_rng
from vlm_calibration.data.resolution import resize_to_model
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.stability import Stability
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.perturbation.by_kind import region_perturbation
from vlm_calibration.perturbation.levels import Perturbation
from vlm_calibration.records import DataError, LoadedImage

from .conftest import ASKED, LEVELS, Answering, logits, samples_of, scenes, with_copies
from .naive import Alone

POLICY = NoisePolicy()
STRENGTHS = {"noise": [0.2, 0.3], "blur": [0.2]}
ANSWERS = ("Yes", "a blue umbrella", "No", "It is white")


@torch.no_grad()
def test_the_likelihood_is_the_mean_over_perturbed_images(
    demo: tuple[Any, ChatFormat], answering: Answering
) -> None:
    (model, chat), samples, estimator = demo, samples_of(scenes(4)), Stability(STRENGTHS, seed=3)
    texts = [text for *_, text in ASKED]
    batch = answering(
        model, chat, with_copies(samples, estimator.copies, chat), texts, LEVELS, keep_cache=True
    )
    estimate = estimator.estimate(batch)

    expected = []
    for sample, answer in zip(samples[:3], ANSWERS, strict=False):
        image = resize_to_model(chat.processor.image_processor, sample.image)
        scores = []
        for number, (kind, strength) in enumerate((k, s) for k, own in STRENGTHS.items() for s in own):
            seed = int(query_rng(3, number, sample.query.id, "copy").integers(2**63))
            transform = region_perturbation(kind, POLICY.schedule)
            mask = np.ones(image.shape[:2], dtype=bool)
            copy = transform(image=image, mask=mask, strength=strength, seed=seed)["image"]
            assert not np.array_equal(copy, image)
            alone = Alone(model, chat, copy, sample.query.question)
            yes = alone.against(alone.prompt, "Yes.", "No.") if answer in ("Yes", "No") else None
            scores.append(alone.likelihood(answer) if yes is None else yes if answer == "Yes" else 1 - yes)
        expected.append(sum(scores) / len(scores))
    *rated, last = estimate.confidence
    assert logits(rated) == pytest.approx(logits(expected), abs=2e-3)
    assert last is None, "the answer is neither yes nor no"
    assert estimate.passes == [3] * 4
    # Other estimators do not notice the copies.
    plain = answering(model, chat, samples, texts, LEVELS, keep_cache=True)
    for other in (ExpectedConfidence(), AnswerLikelihood()):
        assert other.estimate(batch) == other.estimate(plain)


# --- Copies from the data module ----------------------------------------------------------------------------------


def _batches(
    folder: str, estimator: Stability | None, answered: dict[str, list[int]] | None = None, **settings: Any
) -> list[PromptBatch]:
    test = {"a": EvalSplit(DemoSource("test", scenes=2), "drawn")}
    module = PerturbedQueryDataModule(folder, test=test, **{"workers": 0, "eval_batch_size": 4, **settings})
    needs = DataNeeds(copies={"test": estimator.copies if estimator else ()})
    module.trainer = SimpleNamespace(lightning_module=SimpleNamespace(data_needs=needs))  # type: ignore[assignment]
    module.setup("test")
    module.trainer = None
    module.leave_out_answered(answered or {})
    return list(module.test_dataloader())  # type: ignore[arg-type]


def _pixels(batches: Sequence[PromptBatch]) -> dict[str, list[bytes]]:
    """Query id -> the pixels of each copy."""
    by_query: dict[str, list[bytes]] = {}
    for batch in batches:
        for copied in batch.copies.values():
            for row, pixels in zip(copied.rows, copied.inputs["pixel_values"], strict=True):
                by_query.setdefault(batch.queries[row].id, []).append(pixels.numpy().tobytes())
    return by_query


@pytest.mark.slow
def test_copies_depend_on_seed_and_query_alone(model_folder: str) -> None:
    estimator = Stability(STRENGTHS)
    expected = _pixels(_batches(model_folder, estimator))
    assert len(expected) == 6
    assert all(len(set(copies)) == 3 for copies in expected.values())
    assert _pixels(_batches(model_folder, estimator, eval_batch_size=5, workers=2)) == expected
    assert _pixels(_batches(model_folder, Stability(STRENGTHS, seed=1))) != expected
    # A resumed evaluation asks the rest only.
    rest = _pixels(_batches(model_folder, estimator, {"test": [0, 3]}))
    assert len(rest) == 4
    assert rest == {query: expected[query] for query in rest}


def test_batches_are_the_same_beside_their_copies(model_folder: str) -> None:
    with_copies, without = _batches(model_folder, Stability(STRENGTHS)), _batches(model_folder, None)
    for a, b in zip(with_copies, without, strict=True):
        assert not b.copies
        assert a._replace(inputs={}, copies={}) == b._replace(inputs={}, copies={})
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
        for copied in a.copies.values():
            assert torch.equal(copied.inputs["input_ids"], a.inputs["input_ids"])


@torch.no_grad()
def test_a_query_without_a_region_has_no_confidence(
    demo: tuple[Any, ChatFormat], answering: Answering
) -> None:
    (model, chat), estimator = demo, Stability(region="object")

    def regions_of(row: int, image: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        return [np.eye(*image.shape[:2], dtype=bool)] * row, []

    samples = with_copies(samples_of(scenes(2), ASKED[:1] * 2), estimator.copies, chat, regions_of)
    estimate = estimator.estimate(answering(model, chat, samples, ["No", "Yes"]))
    assert estimate.confidence[0] is None
    assert estimate.confidence[1] is not None
    assert estimate.passes == [0, 4]
    assert estimator.estimate(answering(model, chat, samples[:1], ["No"])) == ([None], [0])


def test_copies_are_made_of_the_perturbed_image() -> None:
    sample = samples_of(scenes(1), ASKED[:1])[0]
    blurred = ImageCopy(Perturbation("blur", 0.05))
    black = sample._replace(image=np.zeros_like(sample.image))
    native = replace(POLICY, resolution="native")
    copy = perturbed_copies(black, LoadedImage(sample.image, (), ()), [blurred], native, None)[blurred]
    assert copy is not None
    assert not copy.any()


# --- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strengths": {"rain": [0.1]}}, "'rain'"),
        ({"strengths": {}}, "one or more copies"),
        ({"strengths": {"blur": [0.0]}}, r"in \(0, 1\]"),
        ({"strengths": {"blur": [float("nan")]}}, r"in \(0, 1\]"),
        ({"strengths": {"blur": [1.1]}}, r"in \(0, 1\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Stability(**settings)
