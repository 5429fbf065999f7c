"""Stability and probes, which read perturbed copies of images: against one image and one response at a time; which pixels change; refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from vlm_calibration.data.collate import ChatFormat
from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.module import PerturbedQueryDataModule, load_processor
from vlm_calibration.data.noise import (
    CopiedRegion,
    ImageCopy,
    NoisePolicy,
    Sample,
    perturbed_copies,
    query_rng,
)
from vlm_calibration.data.resolution import resize_to_model
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.probes import (
    BLANK,
    COPIES,
    PROBES,
    check_probes,
)
from vlm_calibration.estimators.stability import Stability
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.models.base import DEMO_MODEL
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.perturbation import perturb
from vlm_calibration.perturbation.by_kind import region_perturbation
from vlm_calibration.perturbation.levels import Perturbation
from vlm_calibration.perturbation.masks import resize_mask
from vlm_calibration.records import ORIGINAL, DataError, LoadedImage, Query
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.text.confidence import ElicitationPrompt, render_response
from vlm_calibration.text.grading import grade

from .conftest import ASKED, LEVELS, ROWS, Answering, logits, samples_of, scenes, with_copies
from .naive import Alone

POLICY = NoisePolicy()
STRENGTHS = {"noise": [0.2, 0.3], "blur": [0.2]}
ANSWERS = ("Yes", "a blue umbrella", "No", "It is white", None)
OTHERS = ("No", "a red ball", "Yes", None, None)


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


@torch.no_grad()
def test_a_query_without_a_region_has_no_confidence(
    demo: tuple[Any, ChatFormat], answering: Answering
) -> None:
    (model, chat), estimator = demo, Stability(region="object")
    samples = with_copies(samples_of(scenes(3), ASKED[:1] * 3), estimator.copies, chat, regions_of)
    estimate = estimator.estimate(answering(model, chat, samples, ["No", "Yes", "Yes"]))
    assert [c is None for c in estimate.confidence] == [False, False, True]
    assert estimate.passes == [4, 4, 0]
    assert estimator.estimate(answering(model, chat, samples[2:], ["No"])) == ([None], [0])


@pytest.mark.parametrize(
    ("strengths", "message"),
    [({"rain": [0.1]}, "'rain'"), ({}, "one or more copies"), ({"blur": [float("nan")]}, r"in \(0, 1\]")],
)
def test_settings_that_make_no_sense_are_refused(strengths: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Stability(strengths)


# --- Probes ---


OBJECT, DISTRACTOR = (slice(2, 9), slice(3, 12)), (slice(12, 19), slice(5, 15))
"""Boxes of the regions, in images of at least 20 x 16 pixels."""


def mask_of(image: np.ndarray, box: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros(image.shape[:2], dtype=bool)
    mask[box] = True
    return mask


def regions_of(row: int, image: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Key objects and distractors: the third query has no key object, the second no distractor."""
    evidence = [] if row == 2 else [mask_of(image, OBJECT)]
    return evidence, [] if row == 1 else [mask_of(image, DISTRACTOR)]


def blanked(row: int, image: np.ndarray, region: str, processor: Any) -> np.ndarray | None:
    """The image at the model's resolution with one part blank, made by hand."""
    evidence, distractors = regions_of(row, image)
    image = resize_to_model(processor, image)
    if region == "image":
        return np.full_like(image, 128)
    masks = evidence if region == "object" else distractors
    if not masks:
        return None
    mask = resize_mask(masks[0], image.shape[:2])
    return perturb(image, mask, 0.0, seed=0, kind="fade")


@torch.no_grad()
def test_confidences_are_those_read_one_response_at_a_time(
    asked: tuple[Any, ChatFormat, list[Sample]], answering: Answering
) -> None:
    model, chat, samples = asked
    texts = [text for *_, text in ROWS]
    copied = with_copies(samples, [*COPIES.values()], chat, regions_of)
    batch = answering(model, chat, copied, texts, LEVELS, keep_cache=True)
    # As if generated in five passes: models with random weights write without end.
    vars(batch)["_second_choices"] = {1: ("a red ball. Confidence: 60%", 5)}
    probed, passes = batch.read_probes(PROBES)
    scored: dict[str, Any] = {name: batch.score_copy(copy, with_levels=True) for name, copy in COPIES.items()}
    scored["answer"] = batch.score_rivals()
    processor, levels = chat.processor.image_processor, (0.9, 0.6, 0.3)
    for row, (sample, answer) in enumerate(zip(samples, ANSWERS, strict=True)):
        images = {name: blanked(row, sample.image, name, processor) for name in COPIES}
        cases = {ORIGINAL: (sample.image, answer), "answer": (sample.image, OTHERS[row])}
        cases |= {name: (image, answer) for name, image in images.items()}
        assert probed[row].keys() == cases.keys()
        for name, (image, given) in cases.items():
            found = probed[row][name]
            if image is None or given is None:
                assert found is None, (row, name)
                continue
            alone = Alone(model, chat, image, sample.query.question)
            responses = [render_response(given, level) for level in levels]
            log_p = [math.fsum(alone.response(alone.prompt, text)[1]) for text in responses]
            assert found == levels[int(np.argmax(log_p))], (row, name)
            if name != ORIGINAL:
                assert scored[name][row].level_log_p.tolist() == pytest.approx(log_p, abs=2e-3), (row, name)
    # The original, three copies of which two images lack one each, and three other answers, one of them generated.
    assert passes == [5, 9, 4, 4, 4]


@torch.no_grad()
def test_the_other_answer_is_the_opposite_or_begins_with_the_second_likeliest_token(
    answering: Answering,
) -> None:
    model, source = (
        load_base(BaseModel(str(DEMO_MODEL), dtype="float32")),
        DemoSource("development", scenes=4),
    )
    chat = ChatFormat(load_processor(str(DEMO_MODEL)), ElicitationPrompt())
    queries, tokenizer = source.queries(), chat.processor.tokenizer
    rows = [(q.question, q.answer, q.answer_type, "") for q in queries]
    images = [source.load(query).image for query in queries]
    batch = answering(model, chat, samples_of(images, rows), max_new_tokens=12)
    assert {q.answer_type for q in queries} == {"yes_no", "short"}
    for row, (query, image, own) in enumerate(zip(queries, images, batch.predictions, strict=True)):
        text = {"yes": "No", "no": "Yes"}.get(own.predicted or "")
        if query.answer_type == "short":
            inputs = chat.inputs([chat.render(query.question)], [image], "left")
            likeliest = int(model(**inputs).logits[0, -1].argmax())
            settings = {"max_new_tokens": 12, "pad_token_id": tokenizer.pad_token_id}
            [ids] = model.generate(**inputs, begin_suppress_tokens=[likeliest], **settings)
            generated = ids[inputs["input_ids"].shape[1] :].tolist()
            text = tokenizer.decode(generated, skip_special_tokens=True).strip()
            assert batch._second_choices[row][1] == generated.index(tokenizer.eos_token_id) + 1
        rival = batch.rivals[row]
        assert rival.text == text
        assert rival.predicted != own.predicted
        assert rival.correct == grade(text, query.answer, query.answer_type).correct


@torch.no_grad()
def test_probes_and_other_copies_are_read_together_as_alone(
    demo: tuple[Any, ChatFormat], answering: Answering
) -> None:
    model, chat = demo
    samples, texts = samples_of(scenes(5), ROWS), [text for *_, text in ROWS]
    stable = Stability({"noise": [0.2], "fade": [1.0]})
    together, probes, copies = (
        answering(model, chat, with_copies(samples, wanted, chat, regions_of), texts, LEVELS)
        for wanted in ([*stable.copies, *COPIES.values()], [*COPIES.values()], stable.copies)
    )
    assert together.read_probes(PROBES) == probes.read_probes(PROBES)
    assert stable.estimate(together) == stable.estimate(copies)
    assert together.read_probes(("object",))[0] == [
        {name: p[name] for name in (ORIGINAL, "object")} for p in probes.read_probes(PROBES)[0]
    ]
    assert [p.keys() for p in copies.read_probes(("answer",))[0]] == [{ORIGINAL, "answer"}] * 5
    with pytest.raises(ValueError, match="without the copies"):
        copies.read_probes(("image",))


# --- Which pixels change ------------------------------------------------------------------------------------------


class _Boxes(QuerySource):
    """A square for each named object: a dog and a cat apart, and a car that touches the dog."""

    boxes: ClassVar = {"dog": (4, 16, 4, 16), "cat": (24, 36, 24, 36), "car": (10, 20, 10, 20)}

    def __init__(self, objects: Sequence[str] = ("dog", "cat", "car"), asked: str = "dog") -> None:
        self.objects = list(objects)
        self.asked = asked

    def queries(self) -> Sequence[Query]:
        return [Query(f"q{i}", "x", f"A {self.asked}?", "Yes", "yes_no", (self.asked,)) for i in range(3)]

    def load(self, query: Query) -> LoadedImage:
        image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        masks = {}
        for name in self.objects:
            top, bottom, left, right = self.boxes[name]
            masks[name] = mask_of(image, (slice(top, bottom), slice(left, right)))
        evidence = tuple(m for name, m in masks.items() if name == self.asked)
        return LoadedImage(image, evidence, tuple(m for name, m in masks.items() if name != self.asked))

    def has_evidence(self, query: Query) -> bool:
        return self.asked in self.objects

    def has_distractor(self, query: Query) -> bool:
        return any(name != self.asked for name in self.objects)


def changes(source: QuerySource, region: CopiedRegion, seed: int = 0) -> list[np.ndarray | None]:
    """For each query which pixels its copy changes, bool [40, 40]; None without a copy."""
    dataset = PerturbedQueries({"": EvalSplit(source)}, NoisePolicy(resolution="native"), None)
    copy = ImageCopy(BLANK, region, seed)
    dataset.make_copies([copy])
    samples = [dataset[0, i] for i in range(len(dataset))]
    images = [(s.image, s.copies[copy]) for s in samples]
    return [None if changed is None else (changed != image).any(-1) for image, changed in images]


def test_a_distractor_is_one_object_that_does_not_touch_the_key_object() -> None:
    """The car touches the dog; asked about the cat, both are distractors, and either is drawn."""
    assert changes(_Boxes(("dog", "car")), "distractor") == [None] * 3
    drawn = [c for seed in range(8) for c in changes(_Boxes(asked="cat"), "distractor", seed)]
    assert {c is not None and int(c.sum()) > 120 for c in drawn} == {True, False}
    # An absent object leaves all others.
    assert None not in [c if c is None else 1 for c in changes(_Boxes(("cat",)), "distractor")]


def test_probes_have_one_order() -> None:
    assert check_probes(["answer", "image"]) == ("image", "answer")


def test_copies_are_made_of_the_perturbed_image() -> None:
    sample = samples_of(scenes(1), ASKED[:1])[0]
    blurred, native = ImageCopy(Perturbation("blur", 0.05)), NoisePolicy(resolution="native")
    black = sample._replace(image=np.zeros_like(sample.image))
    copy = perturbed_copies(black, LoadedImage(sample.image, (), ()), [blurred], native, None)[blurred]
    assert copy is not None
    assert not copy.any()


def test_the_demo_knows_its_distractors() -> None:
    for source in (DemoSource("test", 3), DemoSource("test", 6, hard=1.0)):
        for query in source.queries():
            assert source.has_distractor(query) == bool(source.load(query).distractors)


# --- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "objects"), [("object", ("cat",)), ("distractor", ("dog",)), ("object", ())]
)
def test_a_split_without_such_a_region_is_named(
    model_folder: str, region: str, objects: tuple[str, ...]
) -> None:
    parts = {"fine": EvalSplit(_Boxes()), "bare": EvalSplit(_Boxes(objects))}
    module = PerturbedQueryDataModule(model_folder, test=parts, workers=0)
    asking = EvaluationModule(BaseModel(model_folder), probes=[region])  # type: ignore[list-item]
    module.trainer = SimpleNamespace(lightning_module=asking)  # type: ignore[assignment]
    with pytest.raises(DataError, match=rf"data\.test\.bare: .*'{region}' out of model\.probes"):
        module.setup("test")
