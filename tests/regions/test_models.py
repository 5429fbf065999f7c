"""Tiny Grounding DINO, OWLv2, SAM and SAM 2: boxes and masks against plain arithmetic, alone and in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm_calibration.records import DataError
from vlm_calibration.regions.detector import Detection, ZeroShotDetector
from vlm_calibration.regions.segmenter import PromptedSegmenter

from .conftest import DETECTORS, SEGMENTERS

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((50, 80), (120, 60), (64, 64))]
PHRASES = [["dog", "red cup"], ["cat"], ["a. Dog", "cup", "cat"]]
BOXES: list[list[tuple[float, float, float, float]]] = [
    [(5.0, 5.0, 30.0, 30.0), (1.0, 1.0, 70.0, 45.0)],
    [(10.5, 10.25, 50.0, 100.0)],
    [(0.0, 0.0, 64.0, 64.0), (20.0, 30.0, 25.0, 33.0), (40.0, 5.0, 60.0, 60.0)],
]


def _detector(folder: str, **settings: Any) -> ZeroShotDetector:
    detector = ZeroShotDetector(folder, **{"threshold": 0.05, **settings})
    detector.load(CPU)
    return detector


def _assert_close(actual: Sequence[Detection], expected: Sequence[Detection]) -> None:
    assert [d.label for d in actual] == [d.label for d in expected]
    assert np.allclose([d.box for d in actual], [d.box for d in expected], atol=1e-2)
    assert np.allclose([d.score for d in actual], [d.score for d in expected], atol=1e-4)


def _detect_plainly(
    name: str, detector: ZeroShotDetector, image: np.ndarray, phrases: list[str]
) -> list[Detection]:
    """Detections of one image, computed from the raw output."""
    prompts = [p.lower().replace(".", "") for p in phrases]
    text: Any = [". ".join(prompts) + "."] if name == "grounding_dino" else [prompts]
    inputs = detector.processor(images=[image], text=text, return_tensors="pt", truncation=True)
    with torch.no_grad():
        output = detector.model(**inputs)
    height, width = image.shape[:2]
    scores, boxes = output.logits[0].double().sigmoid().numpy(), output.pred_boxes[0].double().numpy()
    across, down = (max(height, width),) * 2
    if name == "grounding_dino":
        across, down = width, height
        tokens = detector.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        # The number of dots before a token is that of its phrase.
        phrase_of = np.where(
            [t in ("[CLS]", "[SEP]", ".") for t in tokens], -1, np.cumsum([t == "." for t in tokens])
        )
        by_token = scores[:, : len(tokens)]
        scores = np.stack([by_token[:, phrase_of == p].max(axis=1) for p in range(len(phrases))], axis=1)
    detections = []
    for of_phrases, (cx, cy, w, h) in zip(scores, boxes, strict=True):
        best = int(of_phrases.argmax())
        x0, x1 = (min(max((cx + s * w / 2) * across, 0), width) for s in (-1, 1))
        y0, y1 = (min(max((cy + s * h / 2) * down, 0), height) for s in (-1, 1))
        if of_phrases[best] > detector.threshold and x1 > x0 and y1 > y0:
            detections.append(Detection(phrases[best], (x0, y0, x1, y1), of_phrases[best]))
    return sorted(detections, key=lambda d: -d.score)


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_against_the_raw_output_alone_and_in_a_batch(tiny: Callable[[str], str], name: str) -> None:
    """Three image sizes with one, two and three phrases: padding changes the results little or not at all."""
    detector = _detector(tiny(name))
    together = detector.detect(IMAGES, PHRASES)
    for image, phrases, batched in zip(IMAGES, PHRASES, together, strict=True):
        [alone] = detector.detect([image], [phrases])
        expected = _detect_plainly(name, detector, image, phrases)
        assert len(expected) > 1
        _assert_close(alone, expected)
        assert {d.label for d in batched} <= set(phrases)
        if name == "owlv2":
            _assert_close(batched, alone)
        else:
            # In transformers, padding slightly affects Grounding DINO's features.
            assert abs(len(batched) - len(alone)) <= 6
    assert detector.detect([], []) == []


@pytest.mark.parametrize("name", DETECTORS)
def test_threshold_and_limit(tiny: Callable[[str], str], name: str) -> None:
    folder = tiny(name)
    [best] = _detector(folder, threshold=0.0, max_boxes=100).detect(IMAGES[:1], [["dog", "cup"]])
    assert len({d.box for d in best}) == len(best), "a box has one phrase"
    limit = sorted(d.score for d in best)[len(best) // 2]
    [above] = _detector(folder, threshold=limit, max_boxes=100).detect(IMAGES[:1], [["dog", "cup"]])
    assert above == [d for d in best if d.score > limit]
    [few] = _detector(folder, threshold=0.0, max_boxes=2).detect(IMAGES[:1], [["dog", "cup"]])
    for label in ("dog", "cup"):
        assert [d for d in few if d.label == label] == [d for d in best if d.label == label][:2]


def _mask_plainly(segmenter: PromptedSegmenter, image: np.ndarray, box: tuple[float, ...]) -> np.ndarray:
    """The mask of one box, computed from the raw output with the resizing of the SAM papers."""
    inputs = segmenter.processor(images=[image], input_boxes=[[list(box)]], return_tensors="pt")
    sizes = {k: inputs.pop(k) for k in ("original_sizes", "reshaped_input_sizes") if k in inputs}
    inputs = {k: v.float() for k, v in inputs.items()}
    with torch.no_grad():
        logits = segmenter.model(**inputs, multimask_output=False).pred_masks[0, 0]
    resize = torch.nn.functional.interpolate
    if "reshaped_input_sizes" in sizes:
        # SAM pads at the bottom and on the right; remove the padding.
        height, width = sizes["reshaped_input_sizes"][0].tolist()
        logits = resize(logits[None], (64, 64), mode="bilinear", align_corners=False)[0]
        logits = logits[:, :height, :width]
    return (resize(logits[None], image.shape[:2], mode="bilinear", align_corners=False)[0, 0] > 0).numpy()


@pytest.mark.parametrize("name", SEGMENTERS)
def test_masks_against_the_raw_output_alone_and_in_a_batch(tiny: Callable[[str], str], name: str) -> None:
    segmenter = PromptedSegmenter(tiny(name))
    segmenter.load(CPU)
    together = segmenter.segment(IMAGES, BOXES)
    shares = []
    for image, boxes, masks in zip(IMAGES, BOXES, together, strict=True):
        assert masks.shape == (len(boxes), *image.shape[:2])
        assert masks.dtype == bool
        for box, mask in zip(boxes, masks, strict=True):
            expected = _mask_plainly(segmenter, image, box)
            shares.append(float(expected.mean()))
            assert (mask != expected).mean() < 0.005
    assert 0.05 < min(shares) < max(shares) < 0.95, "neither empty nor full masks"
    assert len({round(s, 4) for s in shares}) == len(shares)
    assert segmenter.segment([], []) == []


def test_models_that_cannot_be_used(tiny: Callable[[str], str], tmp_path: Path, model_folder: str) -> None:
    for kind in (ZeroShotDetector, PromptedSegmenter):
        with pytest.raises(DataError, match="cannot load AutoModelFor.* from 'no/such-model'") as caught:
            kind("no/such-model").load(CPU)
        assert "\n" not in str(caught.value)
        with pytest.raises(DataError, match="cannot load"):
            kind(model_folder).load(CPU)
    with pytest.raises(DataError, match="cannot load"):
        ZeroShotDetector(tiny("sam")).load(CPU)
    with pytest.raises(DataError, match="needs 0 <= threshold < 1"):
        ZeroShotDetector(threshold=1.0)
