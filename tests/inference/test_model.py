"""A loaded model answers as in an evaluation, in any batch and for any kind of image; its answers, and errors of loading."""

from __future__ import annotations

import ast
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

import vlm_calibration
from vlm_calibration.data.collate import PromptCollator
from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import LocalSystem
from vlm_calibration.estimators.decision import AppliedRule
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.inference.asking import Answer, answer_type_of, pixels_of
from vlm_calibration.inference.model import BASE, CALIBRATED, DEMO_MODEL, CalibratedModel, load_calibrated
from vlm_calibration.models.adapters import load_adapters
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.records import DataError
from vlm_calibration.text.confidence import strip_confidence

from ..data.conftest import refused
from ..decision_rules import write_decision_rule


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base": "no/model", "device": "cuda:99"}, "device: 'cuda:99' needs a GPU, found"),
        ({"device": "cudda"}, 'device: expected "cpu", "cuda" or "cuda:N", found \'cudda\''),
        ({}, "nothing to ask: give a base model, an adapter, or both"),
        ({"adapter": "{tmp}"}, "no adapter at {tmp}"),
        ({"base": "{tmp}"}, "cannot load a model from '{tmp}'"),
    ],
)
def test_what_cannot_be_loaded_is_named(settings: dict[str, str], says: str, tmp_path: Path) -> None:
    with refused(says.format(tmp=tmp_path)):
        load_calibrated(**{name: value.format(tmp=tmp_path) for name, value in settings.items()})


SOURCE = DemoSource("test", scenes=4)


@pytest.fixture(scope="module")
def asked() -> list[tuple[np.ndarray, str]]:
    return [(SOURCE.load(query).image, query.question) for query in SOURCE.queries()]


def _evaluated(adapter: Path | None) -> list[tuple[str, float | None, float | None]]:
    """Text, stated and expected confidence, computed with the parts of an evaluation."""
    model = load_base(BaseModel(str(DEMO_MODEL)))
    if adapter is not None:
        model = load_adapters(model, {"one": str(adapter)})
    data = PerturbedQueryDataModule(str(DEMO_MODEL))
    samples = PerturbedQueries({"": EvalSplit(SOURCE)}, NoisePolicy(), data.processor.image_processor)
    batch = PromptCollator(data.chat)([samples[0, i] for i in range(len(samples))])
    name = None if adapter is None else "one"
    system = LocalSystem(model.eval(), name, AnswerTokenizer(data.chat), 16, [ExpectedConfidence()])
    return [(p.text, p.confidence, p.estimates["expected"]) for p in system.answer(batch).predictions]


@pytest.mark.slow
def test_answers_are_those_of_an_evaluation(
    calibrated: CalibratedModel, adapter_run: Path, asked: list[Any]
) -> None:
    """In batches of any size, by one system or by both, in several threads, and by a model without an adapter."""
    reference = {BASE: _evaluated(None), CALIBRATED: _evaluated(adapter_run / "adapter")}
    assert reference[BASE] != reference[CALIBRATED]
    both = calibrated.answers([calibrated.sample(*q) for q in asked])
    alone = load_calibrated(str(DEMO_MODEL), device="cpu", max_new_tokens=16)
    assert list(alone.systems) == [BASE]
    assert alone.ask(*asked[0], as_base=True) == alone.ask(*asked[0])
    with ThreadPoolExecutor(2) as threads:
        calls = threads.map(lambda n: list(calibrated.ask_many(asked, n, as_base=n == 5)), (3, 5))
    given = [*zip((CALIBRATED, BASE), calls, strict=True), *both.items()]
    given += [(CALIBRATED, list(calibrated.ask_many(asked, 1))), (BASE, list(alone.ask_many(asked)))]
    for system, answers in given:
        texts, confidences, expected = zip(*reference[system], strict=True)
        assert [(a.text, a.answer) for a in answers] == [(text, strip_confidence(text)) for text in texts]
        assert tuple(a.confidence for a in answers) == confidences
        np.testing.assert_allclose([a.expected for a in answers], expected, atol=2e-4)
    for answer in both[BASE]:
        assert sum(answer.distribution.values()) == pytest.approx(1.0)
        assert list(answer.distribution) == [n / 100 for n in range(100, -1, -1)]
        assert answer.expected == pytest.approx(sum(level * p for level, p in answer.distribution.items()))
        # A percentage is one token here and always followed by the same tokens, so greedy decoding states the likeliest.
        assert answer.confidence == max(answer.distribution, key=answer.distribution.__getitem__)


def test_many_questions_are_answered_as_they_come(calibrated: CalibratedModel, asked: list[Any]) -> None:
    taken = []
    answers = calibrated.ask_many((taken.append(i) or q for i, q in enumerate(asked)), batch_size=2)
    next(answers)
    assert taken == [0, 1]
    assert list(calibrated.ask_many([])) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(calibrated.ask_many(asked, batch_size=0))
    pixels, question = asked[0]
    with pytest.raises(DataError, match="question 2: the question is empty"):
        list(calibrated.ask_many([(pixels, question), (pixels, "  ")]))
    with pytest.raises(DataError, match="question 1.*<image>"):
        calibrated.ask(pixels, "Is <image> a dog?")


# --- Images -----------------------------------------------------------------------------------------------------


def test_pillow_images_are_read_like_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    seen_through = Image.fromarray(rng.integers(0, 256, (6, 9, 4), dtype=np.uint8))
    palette = colours.quantize(4)
    palette.info["transparency"] = 1
    for image in (seen_through, colours.convert("L"), colours.convert("1"), palette):
        image.save(tmp_path / "a.png")
        assert np.array_equal(pixels_of(image), pixels_of(tmp_path / "a.png"))
    assert np.array_equal(pixels_of((tmp_path / "a.png").read_bytes()), pixels_of(str(tmp_path / "a.png")))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    colours.save(tmp_path / "a.tiff", exif=exif)
    assert np.array_equal(pixels_of(Image.open(tmp_path / "a.tiff")), pixels_of(tmp_path / "a.tiff"))
    assert pixels_of(colours.convert("CMYK")).shape == (6, 9, 3)
    pixels = np.asarray(colours)
    assert pixels_of(pixels) is pixels


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("nowhere.png", "nowhere.png: no such file"),
        (b"GIF89a", "image of 6 bytes: "),
        (Image.new("F", (3, 3)), "F pixels have no unique conversion"),
        (Image.new("RGB", (300, 300)), "300 x 300 pixels, more than the 1000 allowed"),
    ],
)
def test_images_that_cannot_be_used_are_refused(image: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        pixels_of(image, max_pixels=1000)
    with pytest.raises(ValueError, match="shape"):
        pixels_of(np.zeros((3, 3), dtype=np.uint8))


# --- Questions and models ---------------------------------------------------------------------------------------


def test_the_kind_of_a_question_is_told_from_its_words() -> None:
    yes_no = ("Is there a dog in the image?", '  "Aren\'t these horses?"')
    short = ("Is it a dog or a cat?", "What is at the top left?", "Isolate the object.")
    assert [answer_type_of(q) for q in (*yes_no, *short)] == ["yes_no"] * 2 + ["short"] * 3


def test_a_run_names_its_base_its_prompt_and_what_its_training_saw(
    adapter_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_run = shutil.copytree(adapter_run, tmp_path / "run")

    def change_card(**facts: Any) -> None:
        path = own_run / "adapter" / "calibration.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))

    template = own_run / "adapter" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", "User: "))
    before = load_calibrated(adapter=own_run, device="cpu").name
    assert "its chat template differs from that of the training" in caplog.text

    weights = own_run / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    change_card(template="Q: {question}", max_new_tokens=7, conversation=None)
    for prompt, expected in ((None, "Q: {question}"), ("{question}?", "{question}?")):
        model = load_calibrated(adapter=own_run, prompt=prompt, device="cpu")
        system = model.systems[CALIBRATED]
        assert isinstance(system, LocalSystem)
        assert (system.tokenizer.chat.prompt.template, system.max_new_tokens) == (expected, 7)
    assert model.name != before
    assert model.name.split(" (")[0] == before.split(" (")[0], "the weights are others"

    # The demo model shows all images at one size, which a limit below it names.
    change_card(max_pixels=100)
    with pytest.raises(DataError, match=r"data\.max_pixels: SiglipImageProcessor.* 100 pixels"):
        load_calibrated(adapter=own_run, device="cpu")


# --- The package ------------------------------------------------------------------------------------------------


def test_the_package_offers_what_it_says() -> None:
    assert vlm_calibration.load_calibrated is load_calibrated
    assert set(vlm_calibration.__all__) <= set(dir(vlm_calibration))
    source = ast.parse(Path(vlm_calibration.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(source) if isinstance(node, ast.ImportFrom)]
    seen_by_type_checkers = {alias.name: node.module for node in imports for alias in node.names}
    for name in vlm_calibration.__all__:
        offered = getattr(vlm_calibration, name)
        assert (offered.__name__, offered.__module__) == (name, seen_by_type_checkers[name])
    with pytest.raises(AttributeError, match="no attribute 'ask'"):
        vlm_calibration.ask  # noqa: B018


# --- Answers and decisions ---


@pytest.mark.parametrize(
    ("threshold", "confidence", "decision", "reason"),
    [
        (0.925, 0.95, "answer", "stated 95%, at least 92.5%"),
        (0.8, 0.8, "answer", "stated 80%, at least 80%"),
        (0.801, 0.8, "review", "stated 80%, below 80.1%"),
        (0.0, None, "review", "no stated confidence"),
        (None, 1.0, "review", "no threshold keeps the limits"),
        (0.0, 0.0, "answer", "stated 0%, at least 0%"),
    ],
)
def test_the_decision_and_its_reason(
    threshold: float | None, confidence: float | None, decision: str, reason: str
) -> None:
    rule = AppliedRule(threshold, "verbalized", confidence, "", "At most 5% ...")
    answer = Answer("Yes", "Yes", confidence, None, {1.0: 0.5, 0.5: 0.00001, 0.0: 0.49999}, "yes_no", rule)
    assert (rule.decision, answer.decision, answer.reason) == (decision, decision, reason)
    as_json = json.loads(json.dumps(answer.to_dict()))
    assert (as_json["decision"], as_json["threshold"]) == (decision, threshold)
    keys = {"text", "answer", "confidence", "expected", "answer_type", "warning", "unfamiliar"}
    assert as_json.keys() == keys | {"distribution", "decision", "threshold"}
    assert "distribution" not in repr(answer), "which is long"
    assert as_json["distribution"] == [[1.0, 0.5], [0.0, 0.49999]], "what is hardly stated is left out"


def test_the_expected_confidence_of_a_rule_is_that_of_the_evaluation(
    adapter_run: Path, asked: list[Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter_run / "adapter", tmp_path / "adapter")
    write_decision_rule(folder, estimator="expected")
    deciding = load_calibrated(adapter=folder, device="cpu", max_new_tokens=16)
    for answer in deciding.ask_many(asked[:6]):
        assert answer.rule is not None
        assert answer.rule.confidence == round(answer.expected or 0, 6)
        assert answer.decision == ("answer" if (answer.expected or 0) >= 0.5 else "review")
    assert deciding.ask(*asked[0], as_base=True).decision is None
