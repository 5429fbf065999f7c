"""Scenes, questions, shifts and the source: deterministic in their seed, exact masks, true answers, disjoint splits.

Also what the demo model knows of a question, and the model itself.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from scipy.ndimage import binary_dilation
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm_calibration.demo import questions
from vlm_calibration.demo.pictures import GLYPHS, HANDS, LOOK_ALIKES, UNUSUAL, Hand, picture
from vlm_calibration.demo.questions import SPLITS, scene_queries, scene_seed
from vlm_calibration.demo.scenes import (
    CLASSES,
    CORNERS,
    HARD_KINDS,
    SCENE_SIZE,
    SMALL_SIZES,
    THEMES,
    hard_kind,
    render_scene,
    scene_layout,
)
from vlm_calibration.demo.source import SHIFTS, DemoSource, draw_shift, scene_index
from vlm_calibration.losses.sequence import IGNORE
from vlm_calibration.models.base import DEMO_MODEL
from vlm_calibration.records import DataError
from vlm_calibration.text.confidence import render_response
from vlm_calibration.text.grading import grade

from .architecture import IMAGE, IMAGE_TOKENS, PATCH, build_model
from .recipe import DEGRADATIONS, FIRST_SCENE, scene_patches

MANY, FEW = range(200), range(10)
RECIPE = {
    (1, 0): "5b998b4054dcb7c5",
    (1, 7): "08f753393320de66",
    (1, FIRST_SCENE): "9a1362e75d3a2854",
    (1, FIRST_SCENE + 123): "075f2a67bbb8b7b3",
    (1, FIRST_SCENE + 35_199): "852771109fb98e4a",
}
"""Seed -> digest of the pixels and masks that the shipped model was trained on."""


@pytest.mark.parametrize("seed", RECIPE)
def test_the_scenes_of_the_base_model_are_drawn_as_ever(seed: tuple[int, int]) -> None:
    scene = render_scene(seed)
    digest = hashlib.sha256(scene.image.tobytes())
    for item in scene.objects:
        digest.update(item.name.encode() + bytes([item.corner]) + np.packbits(item.mask).tobytes())
    assert digest.hexdigest()[:16] == RECIPE[seed]


def test_easy_scenes_have_one_to_four_objects() -> None:
    counts: Counter[int] = Counter()
    for seed in MANY:
        scene = render_scene(seed)
        assert (scene.image.shape, scene.image.dtype) == ((SCENE_SIZE, SCENE_SIZE, 3), np.uint8)
        counts[len(scene.objects)] += 1
        assert min(item.mask.sum() for item in scene.objects) > 40
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 25
    assert {name for theme in THEMES.values() for name in theme} <= set(CLASSES)


@pytest.mark.parametrize("hand", HANDS)
@pytest.mark.parametrize("kind", ["", *HARD_KINDS])
def test_scenes_are_as_said_and_masks_exact(kind: str, hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scene without its objects differs where the masks are, and nowhere else."""
    scenes = [render_scene((3, index), kind, hand) for index in FEW]
    for index, scene in zip(FEW, scenes, strict=True):
        layout = scene_layout((3, index), kind)
        assert layout.labels == tuple(o.name for o in scene.objects)
        assert layout.corners == tuple(o.corner for o in scene.objects)
        assert set(layout.names) <= set(CLASSES)
        assert len(set(layout.labels)) == len(set(layout.corners)) == len(scene.objects)
        for item in scene.objects:
            rows, columns = np.nonzero(item.mask)
            assert len(rows) > 10, "every object can be seen"
            assert kind != "small" or max(np.ptp(rows), np.ptp(columns)) < SMALL_SIZES[1]
            assert item.corner == 2 * (rows.mean() >= 48) + (columns.mean() >= 48)
        assert sum(o.mask.astype(int) for o in scene.objects).max() <= 1
        assert np.array_equal(scene.image, render_scene((3, index), kind, hand).image)
    monkeypatch.setattr(Image.Image, "alpha_composite", lambda *_: None)
    for index, scene in zip(FEW, scenes, strict=True):
        changed = (scene.image != render_scene((3, index), kind, hand).image).any(axis=-1)
        covered = np.logical_or.reduce([o.mask for o in scene.objects])
        assert not changed[~covered].any()
        assert changed[covered].mean() > 0.97, "faint edges may round to the background colour"


def test_a_neighbour_covers_a_part_of_an_object() -> None:
    """Masks exclude what a later object covers, so that those of covering and covered object touch."""

    def touching(kind: str) -> list[bool]:
        scenes = [[o.mask for o in render_scene((3, index), kind).objects] for index in FEW]
        return [any((binary_dilation(a) & b).any() for a, b in combinations(s, 2)) for s in scenes]

    assert all(touching("overlapping"))
    assert np.mean(touching("")) < 0.5


def test_every_picture_is_another_one_in_each_hand() -> None:
    unusual = [character for characters in UNUSUAL.values() for character in characters]
    characters = [*GLYPHS.values(), *unusual, *(look.character for look in LOOK_ALIKES)]
    assert len(set(characters)) == len(characters)
    pictures = [picture(GLYPHS[name], hand) for name in CLASSES for hand in HANDS]
    assert len({each.resize((32, 32)).tobytes() for each in pictures}) == 2 * len(CLASSES)
    assert all(np.asarray(each)[..., 3].any() for each in pictures)
    for index in FEW:
        layout = scene_layout((3, index), "unusual")
        assert all(c in UNUSUAL[name] for name, c in zip(layout.names, layout.characters, strict=True))


def test_frequencies_make_popular_absent_objects_popular() -> None:
    rng = np.random.default_rng(0)
    present = ("horse", "cow")
    kinds, absent = questions.NEGATIVES, questions.absent_class
    drawn = {kind: Counter(absent(rng, present, kind) for _ in range(1500)) for kind in kinds}
    for counts in drawn.values():
        assert not set(present) & set(counts)
    of_frequent, of_related = (
        {kind: sum(counts[name] for name in group) for kind, counts in drawn.items()}
        for group in (set(CLASSES[:6]), {"pig", "dog", "tree", "house"})
    )
    assert of_frequent["popular"] > 1.3 * of_frequent["random"]
    assert of_related["adversarial"] > 3 * of_related["popular"]


@pytest.mark.parametrize("kind", ["", "look_alike"])
def test_questions_fit_their_scenes(kind: str) -> None:
    """A look-alike is never what an answer is about, but the question about an absent object asks for what it resembles."""
    corners: Counter[str] = Counter()
    looks = set()
    for index in MANY:
        layout = scene_layout(scene_seed("development", index), kind)
        yes, no, corner = queries = scene_queries("development", index, kind)
        assert (yes.answer, no.answer) == ("Yes", "No")
        assert yes.objects[0] in layout.names
        assert no.objects[0] not in layout.names
        for query in (yes, no):
            name = query.objects[0]
            article = "an" if name in ("elephant", "apple", "airplane", "umbrella") else "a"
            assert f" {article} {name}" in query.question
        asked = next(c for c in CORNERS if c in corner.question)
        corners[asked] += 1
        place = layout.corners.index(CORNERS.index(asked))
        assert layout.names[place] == corner.answer == corner.objects[0]
        assert [q.answer_type for q in queries] == ["yes_no", "yes_no", "short"]
        categories = [str(q.category).removeprefix(f"{kind}/") for q in queries]
        assert categories == ["existence", "existence", "position"]
        assert all(grade(q.answer, q.answer, q.answer_type).correct for q in queries)
        if layout.look_alike:
            looks.add(layout.look_alike.name)
            assert no.objects == (layout.look_alike.resembles,)
    assert min(corners.values()) > 25
    assert looks == ({look.name for look in LOOK_ALIKES} if kind else set())
    assert looks.isdisjoint(CLASSES)


def test_splits_share_no_scene_and_no_id() -> None:
    seeds = [scene_seed(split, index) for split in SPLITS for index in MANY]
    assert len(set(seeds)) == len(seeds)
    sources = [DemoSource(split, scenes=25, first=first) for split in SPLITS for first in (0, 25)]
    ids = [query.id for source in sources for query in source.queries()]
    assert len(set(ids)) == len(ids)
    with pytest.raises(ValueError, match="unknown split 'dev': expected one of train, .*, test"):
        scene_seed("dev", 0)


def test_hard_scenes_keep_their_kind_at_every_share() -> None:
    seeds = [scene_seed("train", index) for index in range(2000)]
    kinds = {share: [hard_kind(seed, share) for seed in seeds] for share in (0.0, 0.3, 0.6, 1.0)}
    assert set(kinds[0.0]) == {""}
    counts = Counter(kinds[0.3])
    assert 0.27 < 1 - counts[""] / 2000 < 0.33
    assert all(counts[kind] > 100 for kind in HARD_KINDS)
    assert set(kinds[1.0]) == set(HARD_KINDS)
    for fewer, more in zip(kinds[0.3], kinds[0.6], strict=True):
        assert fewer in ("", more)


@pytest.mark.parametrize("hand", HANDS)
def test_the_source_loads_what_the_questions_are_about(hand: Hand) -> None:
    source = pickle.loads(pickle.dumps(DemoSource("development", scenes=60, first=9, hard=0.5, hand=hand)))
    queries, found = source.queries(), set()
    assert queries == source.queries()
    for query in queries:
        *kind, asked = str(query.category).split("/")
        found.add(*kind or [""])
        assert asked in ("existence", "position")
        assert all(name in query.image for name in kind)
        wrong = source.wrong_answers(query)
        assert wrong
        assert not any(grade(w, query.answer, query.answer_type).correct for w in wrong)
        loaded = source.load(query)
        scene = render_scene(scene_seed("development", scene_index(query)), "".join(kind), hand)
        assert np.array_equal(loaded.image, scene.image)
        assert source.has_evidence(query) == (query.answer != "No")
        about = [o.mask for o in scene.objects if o.name == query.objects[0]]
        assert [m.tobytes() for m in loaded.evidence] == [m.tobytes() for m in about]
        assert len(loaded.evidence) + len(loaded.distractors) == len(scene.objects)
    assert found == {"", *HARD_KINDS}


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_take_more_away_the_stronger_they_are(name: str) -> None:
    change, strengths = SHIFTS[name]

    def harm(strength: float) -> float:
        total = 0.0
        for index in range(20):
            image = render_scene(index).image
            before = image.copy()
            shifted = change(image, strength, np.random.default_rng(0))
            assert (shifted.shape, shifted.dtype) == (image.shape, np.uint8)
            assert np.array_equal(image, before)
            total += float(np.abs(shifted.astype(int) - image).mean())
        return total

    test = [harm(s) for s in strengths]
    assert test == sorted(test)
    assert test[0] > 0
    if change in DEGRADATIONS:
        least, most = DEGRADATIONS[change]
        assert 0 < harm(least) < harm(most) < test[0]
    assert name not in ("noise", "blur", "occlusion"), "training uses them"


def test_the_shifted_source_changes_the_same_scenes() -> None:
    rng = np.random.default_rng(0)
    drawn = Counter(draw_shift(rng) for _ in range(1500))
    assert set(drawn) == {(name, float(s)) for name, (_, strengths) in SHIFTS.items() for s in strengths}
    plain, shifted, lined = (
        DemoSource("development", scenes=40, hard=0.5, **settings)
        for settings in ({}, {"shifted": True}, {"hand": "line"})
    )
    assert plain.queries() == lined.queries()
    kinds: Counter[str] = Counter()
    for before, after in zip(plain.queries(), shifted.queries(), strict=True):
        assert (before.id, before.question, before.answer) == (after.id, after.question, after.answer)
        kind, category = str(after.category).split("/", 1)
        kinds[kind] += 1
        assert category == before.category
        image = shifted.load(after).image
        assert np.array_equal(image, shifted.load(after).image)
        assert not np.array_equal(image, plain.load(before).image)
    assert set(kinds) == set(SHIFTS)


@pytest.mark.parametrize("settings", [{"scenes": 0}, {"first": -1}, {"hard": -0.1}, {"hard": 1.5}])
def test_impossible_sources_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=str(*settings.values())):
        DemoSource("train", **settings)
    with pytest.raises(ValueError, match="unknown split"):
        DemoSource("dev")


def test_without_resvg_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(DataError, match=r"resvg.*vlm-calibration\[demo\]"):
        DemoSource("development", scenes=1, hand="line").queries()
    assert DemoSource("development", scenes=1).queries()


# --- What the demo model knows of a question ----------------------------------------------------------------------------


def test_every_question_of_the_demo_is_known_and_has_its_right_answer() -> None:
    for split in SPLITS:
        for index in range(40):
            names, corners, *_ = scene_layout(scene_seed(split, index))
            objects = dict(zip(names, (CORNERS[corner] for corner in corners), strict=True))
            for query in scene_queries(split, index):
                assert questions.unknown_part(query.question) is None
                known = questions.known_question(query.question)
                assert known is not None
                assert questions.question_about(*known) == query.question
                assert questions.right_answer(query.question, objects) == query.answer


def test_capitals_spaces_and_the_question_mark_do_not_matter() -> None:
    for form, words in questions.FORMS.items():
        question = questions.question_about(form, words[-1])
        for variant in (question.lower(), question[:-1], f"  {question} ", question.replace(" ", "  ")):
            assert questions.known_question(variant) == (form, words[-1])


@pytest.mark.parametrize(
    ("question", "unknown"),
    [
        ("Is there a zebra in the image?", "the word 'zebra'"),
        ("Are there dogs or cats?", "the words 'are', 'dogs', 'or', 'cats'"),
        ("What is in the middle?", "the word 'middle'"),
        ("Ist da ein Hund?", "the words 'ist', 'da', 'ein', 'hund'"),
    ],
)
def test_unknown_words_are_named_with_what_is_known(question: str, unknown: str) -> None:
    message = questions.unknown_part(question)
    assert message is not None
    assert f"the demo model does not know {unknown}; it knows" in message
    for word in (*CLASSES, *CORNERS, "Which object is at the ... of the image?"):
        assert word in message
    assert questions.known_question(question) is None
    assert questions.right_answer(question, {"dog": "top left"}) is None


def test_an_unknown_form_is_answered_with_the_known_forms_of_its_object() -> None:
    message = questions.unknown_part("Is the cat at the top left?") or ""
    assert "this form of question" in message
    assert '"Do you see a cat?"' in message
    assert "dog" not in message
    assert '"What is at the ...?"' in (questions.unknown_part("What is the image?") or "")
    assert questions.right_answer("What is at the top right?", {"dog": "top left"}) is None, "an empty corner"


# --- The model: stock transformers classes, and a tokenizer for these sentences -----------------------------------------------


def test_words_and_percentages_are_one_token(processor: Any) -> None:
    tokenizer = processor.tokenizer
    for word in (*CLASSES, "Yes", "No", *map(str, range(101))):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    for percent in range(101):
        ids = tokenizer(render_response("Yes", percent / 100), add_special_tokens=False)["input_ids"]
        assert len([i for i in ids if tokenizer.decode([i]).strip().isdigit()]) == 1


def test_the_shipped_folder_is_whole_and_small() -> None:
    assert (DEMO_MODEL / "model.safetensors").stat().st_size <= 8 * 2**20
    model = AutoModelForImageTextToText.from_pretrained(DEMO_MODEL)
    shapes = {name: p.shape for name, p in build_model().named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    processor = AutoProcessor.from_pretrained(DEMO_MODEL)
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    image = np.zeros((SCENE_SIZE, SCENE_SIZE, 3), dtype=np.uint8)
    ids = processor(text=[f"{IMAGE} A dog?"], images=[[image]], return_tensors="pt")["input_ids"]
    assert int((ids == model.config.image_token_id).sum()) == IMAGE_TOKENS
    config = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in config, "no remote code"
    # vLLM reads no other names; transformers reads both.
    names = [name for name in load_file(DEMO_MODEL / "model.safetensors") if name.startswith("vision_tower.")]
    assert {name.split(".")[1] for name in names} == {"vision_model"}


def test_a_patch_is_labelled_with_the_object_that_covers_it(processor: Any) -> None:
    """Patches that no object touches get the image token, and those with little of one no label."""
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    _, words, corners, scene = scene_patches(processor, 0)
    side = scene.image.shape[0] // PATCH
    for index, (word, corner) in enumerate(zip(words.tolist(), corners.tolist(), strict=True)):
        y, x = PATCH * (index // side), PATCH * (index % side)
        shares = [float(o.mask[y : y + PATCH, x : x + PATCH].mean()) for o in scene.objects]
        best = scene.objects[int(np.argmax(shares))]
        if max(shares) > 0.2:
            assert (processor.tokenizer.decode([word]).strip(), corner) == (best.name, best.corner)
        else:
            assert (word, corner) == (IGNORE if sum(shares) else image_token, IGNORE)
    assert len(set(words.tolist())) >= 3
