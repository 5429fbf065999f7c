"""Scenes, questions and shifts: deterministic in their seed, exact masks, balanced, and disjoint between splits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from vlm_calibration.demo.pictures import HANDS, picture
from vlm_calibration.demo.questions import (
    NEGATIVES,
    SPLITS,
    absent_class,
    scene_queries,
    scene_seed,
)
from vlm_calibration.demo.scenes import (
    CLASSES,
    CORNERS,
    GLYPHS,
    SCENE_SIZE,
    THEMES,
    class_weights,
    render_scene,
    scene_layout,
)
from vlm_calibration.demo.shifts import DEGRADATIONS, SHIFTS, draw_shift, mild_degradation
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.records import DataError
from vlm_calibration.text.grading import grade

MANY = range(200)


def test_scenes_are_as_described() -> None:
    counts: Counter[int] = Counter()
    for seed in MANY:
        scene = render_scene(seed)
        assert (scene.image.shape, scene.image.dtype) == ((SCENE_SIZE, SCENE_SIZE, 3), np.uint8)
        counts[len(scene.objects)] += 1
        assert min(item.mask.sum() for item in scene.objects) > 40
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 25
    assert len(CLASSES) >= 24
    assert {name for theme in THEMES.values() for name in theme} <= set(CLASSES)
    assert not np.array_equal(render_scene((1, 5)).image, render_scene((1, 6)).image)


def test_every_class_has_a_picture_of_its_own_in_each_hand() -> None:
    pictures = [picture(GLYPHS[name], hand) for name in CLASSES for hand in HANDS]
    assert len({each.resize((32, 32)).tobytes() for each in pictures}) == 2 * len(CLASSES)
    assert all(np.asarray(each)[..., 3].any() for each in pictures)


def test_frequencies_make_popular_absent_objects_popular() -> None:
    assert class_weights().sum() == pytest.approx(1)
    rng = np.random.default_rng(0)
    present = ("horse", "cow")
    drawn = {kind: Counter(absent_class(rng, present, kind) for _ in range(3000)) for kind in NEGATIVES}
    for counts in drawn.values():
        assert not set(present) & set(counts)
    frequent = set(CLASSES[:6])
    related = {"pig", "dog", "tree", "house"}
    of_frequent, of_related = (
        {kind: sum(counts[name] for name in group) for kind, counts in drawn.items()}
        for group in (frequent, related)
    )
    assert of_frequent["popular"] > 1.3 * of_frequent["random"]
    assert of_related["adversarial"] > 3 * of_related["popular"]


def test_questions_fit_their_scenes() -> None:
    corners: Counter[str] = Counter()
    for index in MANY:
        names, in_corners, *_ = scene_layout(scene_seed("train", index))
        yes, no, corner = scene_queries("train", index)
        assert (yes.answer, no.answer) == ("Yes", "No")
        assert yes.objects[0] in names
        assert no.objects[0] not in names
        for query in (yes, no):
            name = query.objects[0]
            article = "an" if name in ("elephant", "apple", "airplane", "umbrella") else "a"
            assert f" {article} {name}" in query.question
        asked = next(c for c in CORNERS if c in corner.question)
        corners[asked] += 1
        assert names[in_corners.index(CORNERS.index(asked))] == corner.answer == corner.objects[0]
        assert [q.answer_type for q in (yes, no, corner)] == ["yes_no", "yes_no", "short"]
        assert [q.category for q in (yes, no, corner)] == ["existence", "existence", "position"]
        assert all(grade(q.answer, q.answer, q.answer_type).correct for q in (yes, no, corner))
    assert min(corners.values()) > 25


def test_splits_share_no_scene_and_no_id() -> None:
    seeds = [scene_seed(split, index) for split in SPLITS for index in MANY]
    assert len(set(seeds)) == len(seeds)
    sources = [DemoSource(split, scenes=25, first=first) for split in SPLITS for first in (0, 25)]
    ids = [query.id for source in sources for query in source.queries()]
    assert len(set(ids)) == len(ids)
    with pytest.raises(
        ValueError, match="unknown split 'dev': expected one of train, calibration, development, test"
    ):
        scene_seed("dev", 0)


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
    if name in DEGRADATIONS:
        degrade, (least, most) = DEGRADATIONS[name]
        assert degrade is change
        assert 0 < harm(least) < harm(most) < test[0]
    assert len(strengths) >= 3
    assert name not in ("noise", "blur", "occlusion"), "training uses them"


def test_draws_cover_all_shifts_and_strengths() -> None:
    rng = np.random.default_rng(0)
    drawn = Counter(draw_shift(rng) for _ in range(1500))
    assert set(drawn) == {(name, float(s)) for name, (_, strengths) in SHIFTS.items() for s in strengths}
    image = render_scene(0).image
    again = [mild_degradation(image, np.random.default_rng(4)) for _ in range(2)]
    assert np.array_equal(*again)


def test_the_shifted_source_degrades_the_same_scenes() -> None:
    plain, shifted = DemoSource("test", scenes=40), DemoSource("test", scenes=40, shifted=True)
    kinds: Counter[str] = Counter()
    for before, after in zip(plain.queries(), shifted.queries(), strict=True):
        assert (before.id, before.question, before.answer) == (after.id, after.question, after.answer)
        kind, category = str(after.category).split("/")
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
