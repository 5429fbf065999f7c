"""The key object of an uploaded image, from detector and segmenter to the noise that the page puts on it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_calibration.app import serve
from vlm_calibration.app.page import EDITOR_SIDE, PageHandlers
from vlm_calibration.app.subject import (
    DETECTED,
    DRAWN,
    WHOLE,
    KeyObjectFinder,
    Subject,
    demo_subject,
    key_object,
    uploaded_subject,
)
from vlm_calibration.cli import main
from vlm_calibration.inference.model import DEMO_MODEL
from vlm_calibration.records import DataError
from vlm_calibration.regions.detector import ZeroShotDetector
from vlm_calibration.regions.phrases import RuleDescriber
from vlm_calibration.regions.segmenter import PromptedSegmenter
from vlm_calibration.regions.tagger import load_tagger

from ..regions.conftest import tiny as tiny
from ..regions.truth import ExactDetector, ExactSegmenter, Truth

SCENES = 6


@pytest.fixture
def upload(tmp_path: Path) -> Callable[[np.ndarray], Subject]:
    """Makes the subject of an uploaded image, without known objects."""

    def sent(image: np.ndarray) -> Subject:
        path = tmp_path / "sent.png"
        Image.fromarray(image).save(path)
        return uploaded_subject(path)

    return sent


def test_all_objects_of_a_question_are_found_and_none_that_is_not_there(
    upload: Callable[[np.ndarray], Subject],
) -> None:
    truth = Truth(SCENES, split="development")
    detector = ExactDetector(truth)
    finder = KeyObjectFinder(RuleDescriber(), detector, ExactSegmenter(truth))
    for index in range(SCENES):
        scene = demo_subject(index)
        subject, masks = upload(scene.image), truth.masks(scene.image)
        first, second, *_ = scene.objects
        expected = {f"Is there a {name} in the image?": masks[name] for name in scene.objects}
        expected[f"Is the {first} brown?"] = masks[first]
        expected[f"Is the {first} to the left of the {second}?"] = masks[first] | masks[second]
        for question, mask in expected.items():
            np.testing.assert_array_equal(key_object(subject, DETECTED, None, question, finder), mask)
    asked = len(detector.asked)
    finder.find(subject, question)
    assert len(detector.asked) == asked, "it is remembered"
    for nothing in ("Is there a guitar?", "Is it raining?"):
        with pytest.raises(DataError, match="detector finds no object of this question: paint over it"):
            key_object(subject, DETECTED, None, nothing, finder)


def test_the_command_s_detector_decides_where_the_page_puts_noise(
    tiny: Callable[[str], str], upload: Callable[[np.ndarray], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vlm-calibration app --detector ... --segmenter ...` with models of random weights, used directly and through the page."""
    served: list[tuple[Any, ...]] = []
    monkeypatch.setattr(serve, "serve", lambda *arguments: served.append(arguments))
    models = ("--detector", tiny("grounding_dino"), "--segmenter", tiny("sam2"))
    assert main(["app", "--base", str(DEMO_MODEL), "--device", "cpu", *models]) == 0
    [(model, finder, report, _)] = served
    handlers = PageHandlers(model, finder, report)

    scene = demo_subject(3)
    subject, question = upload(scene.image), "Is there a cat in the image?"
    detector, segmenter = ZeroShotDetector(tiny("grounding_dino")), PromptedSegmenter(tiny("sam2"))
    for part in (detector, segmenter):
        part.load(torch.device("cpu"))
    [boxes] = detector.detect([scene.image], [["cat"]])
    [masks] = segmenter.segment([scene.image], [[d.box for d in boxes]])
    expected = masks.any(axis=0)
    assert 0.02 < expected.mean() < 0.9, "some of the image, and not all of it"
    np.testing.assert_array_equal(handlers.finder.find(subject, question), expected)

    factor = EDITOR_SIDE // max(scene.image.shape)
    seen = handlers.answer(subject, DETECTED, None, question, "noise", 100)[0][::factor, ::factor]
    changed = (seen != scene.image).any(axis=2)
    assert not changed[~expected].any()
    assert changed[expected].mean() > 0.95
    assert [value for value, _ in handlers.begin(subject)[3].choices] == [DETECTED, DRAWN, WHOLE]


def test_without_the_tagger_no_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "HanTa.HanoverTagger", None)
    load_tagger.cache_clear()
    assert main(["app", "--base", "no/model", "--detector", "no/model", "--segmenter", "no/model"]) == 1
    assert "pip install 'vlm-calibration[regions]'" in capsys.readouterr().err
