"""A loaded model answers as in an evaluation, in any batch and for any kind of image; and errors of loading."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import vlm_calibration
from vlm_calibration.data.collate import PromptCollator
from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.estimators.system import LocalSystem
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.inference.asking import answer_type_of
from vlm_calibration.inference.model import (
    BASE,
    CALIBRATED,
    DEMO_MODEL,
    CalibratedModel,
    load_calibrated,
)
from vlm_calibration.inference.pixels import pixels_of
from vlm_calibration.models.adapters import load_adapters, using_adapter
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.records import DataError
from vlm_calibration.text.confidence import strip_confidence

SNIPPET = """
import vlm_calibration
from vlm_calibration import Answer, load_calibrated

model = load_calibrated("base", "adapter", device="cpu")
reveal_type(load_calibrated)
reveal_type(model.ask("a.png", "A dog?").confidence)
load_calibrated(devise="cpu")
vlm_calibration.load_calibratd
"""


@pytest.mark.nightly
@pytest.mark.slow
def test_editors_and_type_checkers_see_the_signature(root: Path, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), "snippet.py"]
    environment = {**os.environ, "MYPYPATH": str(root / "src"), "MYPY_CACHE_DIR": str(root / ".mypy_cache")}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert 'Revealed type is "def (base: ' in ran.stdout, ran.stdout + ran.stderr
    assert "-> vlm_calibration.inference.asking.CalibratedModel" in ran.stdout
    assert (
        'Revealed type is "float | None"' in ran.stdout
        or 'Revealed type is "Union[float, None]"' in ran.stdout
    )
    assert 'Unexpected keyword argument "devise" for "load_calibrated"' in ran.stdout
    assert 'has no attribute "load_calibratd"' in ran.stdout


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("cuda:99", "device: 'cuda:99' needs a GPU, found"),
        ("cudda", 'device: expected "cpu", "cuda" or "cuda:N", found \'cudda\''),
    ],
)
def test_a_device_that_is_not_there_is_told_before_anything_is_loaded(device: str, says: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(says)}"):
        load_calibrated("no/model", device=device)


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
    with torch.no_grad(), using_adapter(model, None if adapter is None else "one"):
        answered = AnsweredBatch.generate(
            model.eval(), batch, AnswerTokenizer(data.chat), 16, keep_cache=False
        )
        expected = ExpectedConfidence().estimate(answered).confidence
    return [(p.text, p.confidence, e) for p, e in zip(answered.predictions, expected, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_answers_are_those_of_an_evaluation(
    calibrated: CalibratedModel, adapter_run: Path, asked: list[Any], batch_size: int
) -> None:
    for as_base in (False, True):
        reference = _evaluated(None if as_base else adapter_run / "adapter")
        answers = list(calibrated.ask_many(asked, batch_size, as_base=as_base))
        assert [(a.text, a.confidence) for a in answers] == [(t, c) for t, c, _ in reference]
        assert [a.answer for a in answers] == [strip_confidence(t) for t, _, _ in reference]
        np.testing.assert_allclose([a.expected for a in answers], [e for _, _, e in reference], atol=2e-4)


@pytest.mark.slow
def test_an_adapter_answers_otherwise_than_its_base(calibrated: CalibratedModel, asked: list[Any]) -> None:
    with_adapter = [a.text for a in calibrated.ask_many(asked)]
    without = [a.text for a in calibrated.ask_many(asked, as_base=True)]
    assert with_adapter != without
    both = calibrated.answers([calibrated.sample(*q) for q in asked], calibrated.systems)
    assert [a.text for a in both[CALIBRATED]] == with_adapter
    assert [a.text for a in both[BASE]] == without


def test_the_distribution_says_what_is_stated_and_expected(
    calibrated: CalibratedModel, asked: list[Any]
) -> None:
    for answer in calibrated.ask_many(asked, as_base=True):
        assert sum(answer.distribution.values()) == pytest.approx(1.0)
        assert list(answer.distribution) == [n / 100 for n in range(100, -1, -1)]
        mean = sum(level * p for level, p in answer.distribution.items())
        assert answer.expected == pytest.approx(mean)
        # A percentage is one token here and always followed by the same tokens, so greedy decoding states the likeliest.
        assert answer.confidence == max(answer.distribution, key=answer.distribution.__getitem__)


def test_many_questions_are_answered_as_they_come(calibrated: CalibratedModel, asked: list[Any]) -> None:
    taken = []
    answers = calibrated.ask_many((taken.append(i) or q for i, q in enumerate(asked)), batch_size=2)
    next(answers)
    assert taken == [0, 1]
    assert len(list(answers)) == len(asked) - 1
    assert list(calibrated.ask_many([])) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(calibrated.ask_many(asked, batch_size=0))


@pytest.mark.slow
def test_threads_do_not_disturb_each_other(calibrated: CalibratedModel, asked: list[Any]) -> None:
    alone = {base: [a.text for a in calibrated.ask_many(asked, as_base=base)] for base in (False, True)}
    texts: dict[int, list[str]] = {}

    def work(number: int) -> None:
        texts[number] = [a.text for a in calibrated.ask_many(asked, 3, as_base=bool(number % 2))]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {n: alone[bool(n % 2)] for n in range(4)}


# --- Images -----------------------------------------------------------------------------------------------------


def test_an_image_may_come_in_any_form(calibrated: CalibratedModel, asked: list[Any], tmp_path: Path) -> None:
    pixels, question = asked[0]
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    forms = [pixels, image, tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()]
    assert len({str(calibrated.ask(form, question)) for form in forms}) == 1


def test_pillow_images_are_read_like_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    seen_through = Image.fromarray(rng.integers(0, 256, (6, 9, 4), dtype=np.uint8))
    palette = colours.quantize(4)
    palette.info["transparency"] = 1
    for image in (seen_through, colours.convert("L"), colours.convert("1"), palette):
        image.save(tmp_path / "a.png")
        assert np.array_equal(pixels_of(image), pixels_of(tmp_path / "a.png"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    colours.save(tmp_path / "a.tiff", exif=exif)
    assert np.array_equal(pixels_of(Image.open(tmp_path / "a.tiff")), pixels_of(tmp_path / "a.tiff"))
    assert pixels_of(colours.convert("CMYK")).shape == (6, 9, 3)


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


@pytest.mark.slow
def test_a_bomb_is_refused_from_its_header(calibrated: CalibratedModel) -> None:
    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "PNG")
    assert len(file.getvalue()) < 200_000
    with pytest.raises(DataError, match="decompression bomb|30000 x 30000 pixels"):
        calibrated.ask(file.getvalue(), "Is there a dog?")


# --- Questions and models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Is there a dog in the image?", "yes_no"),
        ("  Aren't these horses?", "yes_no"),
        ('"Do you see a cat?"', "yes_no"),
        ("Is it a dog or a cat?", "short"),
        ("What is at the top left?", "short"),
        ("Isolate the object.", "short"),
        ("How many dogs are there?", "short"),
    ],
)
def test_the_kind_of_a_question_is_told_from_its_words(question: str, expected: str) -> None:
    assert answer_type_of(question) == expected


def test_questions_that_cannot_be_asked_are_named(calibrated: CalibratedModel, asked: list[Any]) -> None:
    pixels, question = asked[0]
    with pytest.raises(DataError, match="question 2: the question is empty"):
        list(calibrated.ask_many([(pixels, question), (pixels, "  ")]))
    with pytest.raises(DataError, match="question 1.*<image>"):
        calibrated.ask(pixels, "Is <image> a dog?")


def test_a_run_names_its_base_and_its_prompt(adapter_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapter_run, run)
    path = run / "adapter" / "calibration.json"
    facts = json.loads(path.read_text())
    path.write_text(
        json.dumps({**facts, "template": "Q: {question}", "max_new_tokens": 7, "conversation": None})
    )
    model = load_calibrated(adapter=run, device="cpu")
    [system, _] = model.systems.values()
    assert isinstance(system, LocalSystem)
    assert (system.tokenizer.chat.prompt.template, system.max_new_tokens) == ("Q: {question}", 7)
    model = load_calibrated(adapter=run, prompt="{question}?", device="cpu")
    [system, _] = model.systems.values()
    assert isinstance(system, LocalSystem)
    assert system.tokenizer.chat.prompt.template == "{question}?"


def test_another_chat_template_is_warned_of(
    adapter_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(adapter_run, tmp_path / "run")
    template = tmp_path / "run" / "adapter" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", "User: "))
    load_calibrated(adapter=tmp_path / "run", device="cpu")
    assert "its chat template differs from that of the training" in caplog.text


def test_images_are_shrunk_as_in_the_training(adapter_run: Path, tmp_path: Path) -> None:
    """The demo model shows all images at one size, which a limit below it names."""
    shutil.copytree(adapter_run, tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "calibration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_pixels": 100}))
    with pytest.raises(DataError, match=r"data\.max_pixels: SiglipImageProcessor.* 100 pixels"):
        load_calibrated(adapter=tmp_path / "run", device="cpu")


@pytest.mark.slow
def test_a_model_without_an_adapter(asked: list[Any]) -> None:
    model = load_calibrated(str(DEMO_MODEL), device="cpu", max_new_tokens=16)
    assert list(model.systems) == [BASE]
    assert model.ask(*asked[0]).text == _evaluated(None)[0][0]
    assert model.ask(*asked[0], as_base=True) == model.ask(*asked[0])


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give a base model, an adapter, or both"):
        load_calibrated()
    with pytest.raises(DataError, match=f"no adapter at {tmp_path}"):
        load_calibrated(adapter=tmp_path)
    with pytest.raises(DataError, match="cannot load a model from '"):
        load_calibrated(str(tmp_path))


def test_models_trained_anew_have_another_name(adapter_run: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter_run, tmp_path / "run")
    before = load_calibrated(adapter=tmp_path / "run", device="cpu").name
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = load_calibrated(adapter=tmp_path / "run", device="cpu").name
    assert before != after
    assert before.split(" (")[0] == after.split(" (")[0]


# --- The package ------------------------------------------------------------------------------------------------


def test_the_package_offers_what_it_says() -> None:
    assert vlm_calibration.load_calibrated is load_calibrated
    assert set(vlm_calibration.__all__) <= set(dir(vlm_calibration))
    for name in vlm_calibration.__all__:
        assert getattr(vlm_calibration, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'ask'"):
        vlm_calibration.ask  # noqa: B018


@pytest.mark.slow
def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, vlm_calibration; print(sorted({'torch', 'transformers', 'gradio'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_served_text_is_read_without_torch() -> None:
    code = (
        "import sys; from vlm_calibration import parse_confidence; print(parse_confidence('Yes. Confidence: 80%'), "
        "sorted({'torch', 'transformers', 'lightning'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "0.8 []"
