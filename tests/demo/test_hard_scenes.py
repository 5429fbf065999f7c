"""Naturally hard scenes and line drawings: exact masks, true answers, and the share and kinds that were asked for."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation

from vlm_calibration.demo.pictures import HANDS, LOOK_ALIKES, UNUSUAL, Hand
from vlm_calibration.demo.questions import scene_queries, scene_seed
from vlm_calibration.demo.scenes import (
    CLASSES,
    CORNERS,
    GLYPHS,
    HARD_KINDS,
    SMALL_SIZES,
    hard_kind,
    render_scene,
    scene_layout,
)
from vlm_calibration.demo.source import DemoSource, scene_index
from vlm_calibration.records import DataError
from vlm_calibration.text.grading import grade

from .recipe import FIRST_SCENE

FEW = range(10)
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


@pytest.mark.parametrize("hand", HANDS)
@pytest.mark.parametrize("kind", ["", *HARD_KINDS])
def test_scenes_are_as_described_and_masks_exact(
    kind: str, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same scene without its objects differs where the masks are, and nowhere else."""
    scenes = [render_scene((3, index), kind, hand) for index in FEW]
    for index, scene in zip(FEW, scenes, strict=True):
        layout = scene_layout((3, index), kind)
        assert layout.labels == scene.names
        assert layout.corners == tuple(o.corner for o in scene.objects)
        assert set(layout.names) <= set(CLASSES)
        assert len(set(scene.names)) == len(set(layout.corners)) == len(scene.objects)
        for item in scene.objects:
            rows, columns = np.nonzero(item.mask)
            assert len(rows) > 10, "every object can be seen"
            assert item.corner == 2 * (rows.mean() >= 48) + (columns.mean() >= 48)
        assert sum(o.mask.astype(int) for o in scene.objects).max() <= 1
        assert np.array_equal(scene.image, render_scene((3, index), kind, hand).image)
    monkeypatch.setattr(Image.Image, "alpha_composite", lambda *_: None)
    for index, scene in zip(FEW, scenes, strict=True):
        changed = (scene.image != render_scene((3, index), kind, hand).image).any(axis=-1)
        covered = np.logical_or.reduce([o.mask for o in scene.objects])
        assert not changed[~covered].any()
        assert changed[covered].mean() > 0.97, "faint edges may round to the background colour"


def test_the_objects_are_small() -> None:
    for index in FEW:
        for item in render_scene((3, index), "small").objects:
            rows, columns = np.nonzero(item.mask)
            assert max(np.ptp(rows), np.ptp(columns)) < SMALL_SIZES[1]


def test_a_neighbour_covers_a_part_of_an_object() -> None:
    """Masks exclude what a later object covers, so that those of covering and covered object touch."""
    touching = {}
    for kind in ("", "overlapping"):
        scenes = [[o.mask for o in render_scene((3, index), kind).objects] for index in FEW]
        touching[kind] = [
            any((binary_dilation(a) & b).any() for a, b in combinations(masks, 2)) for masks in scenes
        ]
    assert all(touching["overlapping"])
    assert np.mean(touching[""]) < 0.5


def test_a_look_alike_is_never_what_the_answer_is_about() -> None:
    seen = set()
    for index in range(150):
        layout = scene_layout(scene_seed("development", index), "look_alike")
        look = layout.look_alike
        assert look is not None
        seen.add(look.name)
        yes, no, corner = scene_queries("development", index, "look_alike")
        assert look.resembles not in layout.names
        assert (no.answer, no.objects) == ("No", (look.resembles,))
        assert yes.objects[0] in layout.names
        assert corner.answer in layout.names
        asked = CORNERS.index(next(c for c in CORNERS if c in corner.question))
        assert layout.corners.index(asked) == layout.names.index(corner.answer)
    assert seen == {look.name for look in LOOK_ALIKES}
    assert {look.name for look in LOOK_ALIKES}.isdisjoint(CLASSES)
    assert {look.resembles for look in LOOK_ALIKES} <= set(CLASSES)


def test_unusual_pictures_are_other_pictures_of_the_class() -> None:
    pictures = [character for characters in UNUSUAL.values() for character in characters]
    ordinary = [*GLYPHS.values(), *(look.character for look in LOOK_ALIKES)]
    assert len({*pictures, *ordinary}) == len(pictures) + len(ordinary)
    for index in FEW:
        layout = scene_layout((3, index), "unusual")
        assert all(c in UNUSUAL[name] for name, c in zip(layout.names, layout.characters, strict=True))


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


def test_a_hard_scene_is_the_same_in_every_hand_and_under_every_shift() -> None:
    variants = [
        DemoSource("development", scenes=30, hard=0.5, **settings).queries()
        for settings in ({}, {"hand": "line"}, {"shifted": True})
    ]
    assert variants[0] == variants[1]
    assert [q.id for q in variants[0]] == [q.id for q in variants[2]]


def test_without_resvg_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(DataError, match=r"resvg.*vlm-calibration\[demo\]"):
        DemoSource("development", scenes=1, hand="line").queries()
    assert DemoSource("development", scenes=1).queries()
