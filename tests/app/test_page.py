"""What the page computes, without a browser: answers, perturbed pictures, curves, messages, uploads, and the key objects in them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from vlm_calibration.app import serve
from vlm_calibration.app.page import EDITOR_SIDE, PageHandlers, answer_rows, plain
from vlm_calibration.app.subject import (
    DETECTED,
    DRAWN,
    MAX_PIXELS,
    MAX_UPLOAD,
    WHOLE,
    KeyObjectFinder,
    Subject,
    demo_subject,
    key_object,
    painted,
    uploaded_subject,
)
from vlm_calibration.cli import main
from vlm_calibration.estimators.decision import AppliedRule
from vlm_calibration.inference.asking import Answer
from vlm_calibration.inference.model import BASE, CALIBRATED, DEMO_MODEL, CalibratedModel
from vlm_calibration.perturbation import KIND_NAMES
from vlm_calibration.records import DataError
from vlm_calibration.regions.phrases import RuleDescriber
from vlm_calibration.regions.tagger import load_tagger

from ..regions.conftest import tiny as tiny
from ..regions.truth import ExactDetector, ExactSegmenter, Truth

SUBJECT = demo_subject(2)
KEY = next(iter(SUBJECT.objects))


@pytest.fixture
def handlers(calibrated: CalibratedModel, tmp_path: Path) -> PageHandlers:
    return PageHandlers(calibrated, None, tmp_path / "report.html")


def _small(seen: np.ndarray) -> np.ndarray:
    """A picture of the page at the size of the subject's image."""
    factor = seen.shape[0] // SUBJECT.image.shape[0]
    return seen[::factor, ::factor]


def test_answers_are_those_of_the_models(handlers: PageHandlers, calibrated: CalibratedModel) -> None:
    image, question = SUBJECT.image, SUBJECT.question
    seen, rows, message = handlers.answer(SUBJECT, KEY, None, question, "noise", 0)
    np.testing.assert_array_equal(_small(seen), image)
    base = calibrated.ask(image, question, as_base=True)
    assert rows == answer_rows({BASE: base, CALIBRATED: calibrated.ask(image, question)})
    assert message == ""


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_the_key_object_alone_is_perturbed(handlers: PageHandlers, kind: str) -> None:
    seen = handlers.answer(SUBJECT, KEY, None, SUBJECT.question, kind, 100)[0]
    changed = (_small(seen) != SUBJECT.image).any(axis=2)
    assert changed.any()
    assert not changed[~SUBJECT.objects[KEY]].any()


def test_what_is_painted_is_perturbed(handlers: PageHandlers) -> None:
    layer = np.zeros((EDITOR_SIDE, EDITOR_SIDE, 4), np.uint8)
    layer[: EDITOR_SIDE // 2, : EDITOR_SIDE // 2, 3] = 255
    editor: dict[str, Any] = {"background": None, "layers": [layer], "composite": None}
    empty = {**editor, "layers": [0 * layer]}
    half = SUBJECT.image.shape[0] // 2
    mask = np.zeros(SUBJECT.image.shape[:2], bool)
    mask[:half, :half] = True
    np.testing.assert_array_equal(painted(editor, SUBJECT.image.shape), mask)
    assert painted(empty, SUBJECT.image.shape) is None
    seen = handlers.answer(SUBJECT, DRAWN, editor, SUBJECT.question, "occlusion", 100)[0]
    assert not (_small(seen) != SUBJECT.image).any(axis=2)[~mask].any()
    assert [handlers.choose_painted(SUBJECT, e) for e in (editor, empty)] == [DRAWN, gr.skip()]
    nothing = handlers.answer(SUBJECT, DRAWN, None, SUBJECT.question, "noise", 50)
    assert nothing == (None, [], "Paint over the key object to perturb it.")


def test_the_curve_has_every_strength(handlers: PageHandlers, calibrated: CalibratedModel) -> None:
    curve = handlers.curve(SUBJECT, KEY, None, SUBJECT.question, "noise")
    assert sorted(set(curve.strength)) == pytest.approx(range(0, 101, 10))
    answer = calibrated.ask(SUBJECT.image, SUBJECT.question)
    [first] = curve[(curve.strength == 0) & (curve.line == "Calibrated model, expected")].confidence
    assert first == pytest.approx(100 * (answer.expected or 0))
    assert handlers.curve(SUBJECT, DRAWN, None, SUBJECT.question, "noise") is None


def test_a_new_subject_begins_untouched_with_the_object_of_its_question(handlers: PageHandlers) -> None:
    subject, editor, question, choice, strength = handlers.begin(SUBJECT)
    assert (subject, question, strength) == (SUBJECT, SUBJECT.question, 0)
    assert max(editor["background"].shape) == EDITOR_SIDE
    assert choice.value in SUBJECT.objects
    assert [value for value, _ in choice.choices] == [*SUBJECT.objects, DRAWN, WHOLE]
    assert handlers.name_object(SUBJECT, f"Is there a {KEY}?") == KEY
    assert handlers.name_object(SUBJECT, "Is it raining?") == gr.skip()


def test_a_question_is_flagged_for_the_demo_model_alone(handlers: PageHandlers) -> None:
    zebra = "Is there a zebra in the image?"
    _, rows, message = handlers.answer(SUBJECT, KEY, None, zebra, "noise", 0)
    assert rows == []
    assert "does not know the word 'zebra'" in message
    assert handlers.curve(SUBJECT, KEY, None, zebra, "noise") is None
    seen, rows, message = handlers.answer(SUBJECT, KEY, None, " ", "noise", 100)
    assert seen is not None
    assert (rows, message) == ([], "Ask a question.")
    handlers.model = replace(handlers.model, is_demo=False)
    assert handlers.answer(SUBJECT, KEY, None, zebra, "noise", 0)[1]


def test_files_that_are_no_images_are_refused_and_large_ones_shrunk(
    handlers: PageHandlers, tmp_path: Path
) -> None:
    path = tmp_path / "sent.png"
    for says in ("8000 x 6251 pixels, more than the", "not an image"):
        Image.new("L", (8000, MAX_PIXELS // 8000 + 1)).save(path)
        if says == "not an image":
            path.write_text("text")
        with pytest.raises(gr.Error, match=f"the image: {says}") as refused:
            handlers.begin_upload(str(path))
        assert str(tmp_path) not in str(refused.value)
        assert not path.exists(), "it is deleted"
    Image.new("L", (4000, 3000)).save(path)
    assert uploaded_subject(path).image.shape == (1536, 2048, 3)


def test_the_report_is_isolated(handlers: PageHandlers) -> None:
    assert "No report yet" in handlers.show_report()
    handlers.report.write_text('<a href="#made">made</a><script>"</script>', encoding="utf-8")
    frame = handlers.show_report()
    assert 'sandbox="allow-scripts"' in frame
    assert "<script" not in frame
    assert "about:srcdoc#made" in frame


def test_an_answer_is_a_row_with_its_decision_and_texts_are_shown_as_they_are() -> None:
    assert plain("<b>no</b> [link](x) *") == r"&lt;b&gt;no&lt;/b&gt; \[link\]\(x\) \*."
    rule = AppliedRule(0.925, "verbalized", 0.9, "", "At most 5% ...")
    answer = Answer("Yes. 90%", "Yes", 0.9, None, {}, "yes_no", rule=rule)
    decided = "review: stated 90%, below 92.5%"
    assert answer_rows({CALIBRATED: answer}) == [["Calibrated model", "Yes", "90%", "none", decided]]
    assert answer_rows({BASE: replace(answer, rule=None)})[0][-1] == ""


def test_the_page_is_served_to_this_machine_alone(handlers: PageHandlers) -> None:
    page, settings = serve.build(handlers, 7999)
    assert (settings["server_name"], settings["server_port"], settings["share"]) == ("127.0.0.1", 7999, False)
    assert settings["max_file_size"] == MAX_UPLOAD
    hosts, _ = settings["app_kwargs"]["middleware"]
    assert set(hosts.kwargs["allowed_hosts"]) == {"127.0.0.1", "localhost"}
    assert page.blocks


# --- Key objects of uploaded images ---


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
        expected = {f"Is there a {name} in the image?": masks[name] for name in scene.objects}
        for one, two in pairwise(scene.objects):
            expected[f"Is the {one} to the left of the {two}?"] = masks[one] | masks[two]
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
    """`vlm-calibration app --detector ... --segmenter ...` with models of random weights."""
    served: list[tuple[Any, ...]] = []
    monkeypatch.setattr(serve, "serve", lambda *arguments: served.append(arguments))
    models = ("--detector", tiny("grounding_dino"), "--segmenter", tiny("sam2"))
    assert main(["app", "--base", str(DEMO_MODEL), "--device", "cpu", *models]) == 0
    [(model, finder, report, _)] = served
    handlers = PageHandlers(model, finder, report)
    scene, question = demo_subject(3), "Is there a cat in the image?"
    subject = upload(scene.image)
    found = finder.find(subject, question)
    assert 0.02 < found.mean() < 0.9, "some of the image, and not all of it"
    changed = (
        _small(handlers.answer(subject, DETECTED, None, question, "noise", 100)[0]) != scene.image
    ).any(axis=2)
    assert not changed[~found].any()
    assert changed[found].mean() > 0.95
    assert [value for value, _ in handlers.begin(subject)[3].choices] == [DETECTED, DRAWN, WHOLE]


def test_without_the_tagger_no_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "HanTa.HanoverTagger", None)
    load_tagger.cache_clear()
    assert main(["app", "--base", "no/model", "--detector", "no/model", "--segmenter", "no/model"]) == 1
    assert "pip install 'vlm-calibration[regions]'" in capsys.readouterr().err
