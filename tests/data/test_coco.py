"""The COCO source: masks compared with pycocotools, absent objects with POPE's published rules, answers with the boxes."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from itertools import chain, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from vlm_calibration.data.sources.coco import SIDES, AbsentObjects, CocoSource, read_instances
from vlm_calibration.perturbation.masks import mask_to_rle
from vlm_calibration.records import DataError

from .conftest import refused

NAMES = ("person", "dog", "traffic light", "orange", "sheep", "knife", "bus", "bench", "kite", "umbrella")
HEIGHT, WIDTH = 48, 64
Write = Callable[..., tuple[str, str]]


def _segmentation(kind: str, x: int, y: int, width: int, height: int) -> Any:
    if kind == "polygons":
        x1, y1 = x + width - 0.3, y + height - 0.4
        return [[x, y, x1, y, x, y1], [x1, y, x1, y1, x + 1.5, y1]]
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + height, x : x + width] = True
    encoded = mask_to_rle(mask)
    if kind == "crowd":
        runs = [x * HEIGHT + y, *([height, HEIGHT - height] * (width - 1)), height]
        encoded["counts"] = [*runs, HEIGHT * WIDTH - sum(runs)]
    return encoded


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write images with random objects and their `instances.json`; return its path and the image folder."""

    def written(images: int = 30, change: Callable[[dict[str, Any]], None] | None = None) -> tuple[str, str]:
        rng = np.random.default_rng(0)
        categories = [{"id": 10 + i, "name": n} for i, n in enumerate(NAMES)]
        content: dict[str, Any] = {"categories": categories, "images": [], "annotations": []}
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for i in range(images):
            file = f"{i:012d}.jpg"
            Image.new("RGB", (WIDTH, HEIGHT), "grey").save(folder / file)
            content["images"].append({"id": 500 + i, "file_name": file, "height": HEIGHT, "width": WIDTH})
            for _ in range(int(rng.integers(1, 8))):
                kind = ("polygons", "polygons", "crowd", "rle")[int(rng.integers(4))]
                box = [int(v) for v in rng.integers((0, 0, 3, 3), (WIDTH - 20, HEIGHT - 20, 20, 20))]
                category = 10 + int(rng.integers(len(NAMES)) ** 2 // len(NAMES))
                ids = {"id": len(content["annotations"]) + 1, "image_id": 500 + i, "category_id": category}
                shape = {"segmentation": _segmentation(kind, *box), "bbox": box}
                content["annotations"].append({**ids, **shape, "iscrowd": int(kind == "crowd")})
        if change:
            change(content)
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        return str(path), str(folder)

    return written


def test_masks_are_those_of_pycocotools(write: Write) -> None:
    path, root = write()
    coco = COCO(path)
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    kinds = Counter(type(a["segmentation"]).__name__ + str(a["iscrowd"]) for a in coco.anns.values())
    assert min(kinds.values()) > 10
    assert set(kinds) == {"list0", "dict0", "dict1"}
    masks: dict[str, dict[str, np.ndarray]] = {}
    for a in coco.anns.values():
        of_image = masks.setdefault(coco.imgs[a["image_id"]]["file_name"], {})
        name = names[a["category_id"]]
        of_image[name] = of_image.get(name, np.zeros((HEIGHT, WIDTH), bool)) | coco.annToMask(a).astype(bool)
    source = CocoSource(path, root)
    for query in source.queries():
        loaded, expected = source.load(query), masks[query.image]
        for given, is_evidence in ((loaded.evidence, True), (loaded.distractors, False)):
            of_kind = [mask for name, mask in expected.items() if (name in query.objects) == is_evidence]
            assert sorted(m.tobytes() for m in given) == sorted(m.tobytes() for m in of_kind)
        assert source.has_evidence(query) == bool(loaded.evidence)


def test_questions_are_true_to_the_annotations(write: Write) -> None:
    path, root = write(60)
    source = CocoSource(path, root, per_image=3)
    pictures = {p.file: p for p in read_instances(Path(path))}
    queries = source.queries()
    assert len({q.id for q in queries}) == len(queries)
    answers: Counter[tuple[str | None, str]] = Counter()
    for query in queries:
        picture = pictures[query.image]
        answers[str(query.category).split("/")[0], query.answer] += 1
        if query.category == "counting":
            same = picture.objects[query.objects[0]]
            assert query.answer == str(len(same))
            assert not any(i.crowd for i in same)
            assert query.answer_type == "short"
            assert query.answer not in source.wrong_answers(query)
        elif query.category == "spatial":
            a, b = (picture.objects[name][0] for name in query.objects)
            side = next(s for s in SIDES if f" {s} " in query.question)
            (ax, ay, aw, ah), (bx, by, bw, bh) = a.box, b.box
            sides = (ax + aw <= bx, bx + bw <= ax, ay + ah <= by, by + bh <= ay)
            true = dict(zip(SIDES, sides, strict=True))
            assert query.answer == ("Yes" if true[side] else "No")
            opposite_side = SIDES[SIDES.index(side) ^ 1]
            assert true[side] != true[opposite_side], "one of the two sides is right"
        else:
            assert (query.objects[0] in picture.objects) == (query.answer == "Yes")
            assert query.objects[0] in query.question
    present, absent = answers["existence", "Yes"], answers["existence", "No"]
    assert present == absent > 100
    assert 0.3 < answers["spatial", "Yes"] / (answers["spatial", "Yes"] + answers["spatial", "No"]) < 0.7
    asked = {f"How many {name} are there in the image?" for name in ("people", "sheep", "dogs")}
    assert {*asked, "Is there an orange in the image?"} <= {q.question for q in queries}


def test_the_same_queries_every_time_and_other_settings_draw_others(write: Write) -> None:
    path, root = write(20)
    first = list(CocoSource(path, root).queries())
    assert list(pickle.loads(pickle.dumps(CocoSource(path, root))).queries()) == first
    assert list(CocoSource(path, root, seed=1).queries()) != first
    few = CocoSource(path, root, images=5, kinds=["counting"], per_image=1).queries()
    assert len({q.image for q in few}) == len(few) <= 5
    assert {q.category for q in few} == {"counting"}
    parts = [
        {q.image for q in CocoSource(path, root, first=begin, images=count).queries()}
        for begin, count in ((0, 8), (8, 5), (13, None))
    ]
    assert set.union(*parts) == {q.image for q in first}, "positions without overlap share no image"
    assert sum(map(len, parts)) == 20
    with pytest.raises(DataError, match=f"{path}: first: 20 of 20 annotated images"):
        CocoSource(path, root, first=20).queries()


def test_images_of_a_benchmark_are_left_out(write: Write, tmp_path: Path) -> None:
    path, root = write(6)
    questions = tmp_path / "coco_pope.json"
    questions.write_text('{"image": "COCO_val2014_000000000002.jpg"}\n{"image": "000000000004"}\n')
    source = CocoSource(path, root, exclude=[str(questions)])
    assert {q.image for q in source.queries()} == {f"{i:012d}.jpg" for i in (0, 1, 3, 5)}
    questions.write_text("nothing of the kind 0000000000021\n")
    with pytest.raises(DataError, match="names no image by a number of twelve digits"):
        CocoSource(path, root, exclude=[str(questions)]).queries()


def _by_the_rules(table: list[list[str]], kind: str, choose: Callable[[list[str]], str]) -> list[str]:
    """POPE's absent objects for the first three objects of images in order, as in the paper and its official generator."""
    frequency = Counter(chain.from_iterable(table))
    together = Counter(pair for objects in table for pair in permutations(objects, 2))
    pairs = sorted(together, key=lambda pair: -together[pair])
    asked = []
    for objects in table:
        taken = list(objects)
        for present in objects[:3]:
            ranked = {
                "random": [],
                "popular": sorted(frequency, key=lambda name: -frequency[name]),
                "adversarial": [other for name, other in pairs if name == present],
            }[kind]
            free = [name for name in ranked if name not in taken]
            absent = free[0] if free else choose([name for name in frequency if name not in taken])
            taken.append(absent)
            asked.append(absent)
    return asked


@pytest.mark.parametrize("kind", ["random", "popular", "adversarial"])
def test_absent_objects_follow_the_official_rules(kind: Any) -> None:
    rng = np.random.default_rng(1)
    weights = 1 / np.arange(1, 31)
    names = [f"object {i}" for i in range(30)]
    sizes, p = rng.integers(3, 9, 200), weights / weights.sum()
    table = [list(rng.choice(names, size=int(size), replace=False, p=p)) for size in sizes]
    ours, theirs = np.random.default_rng(7), np.random.default_rng(7)
    absent, drawn = AbsentObjects(table), list[Any]()
    for objects in table:
        taken = list(objects)
        for present in objects[:3]:
            drawn.append(absent.draw(kind, present, taken, ours))
            taken.append(drawn[-1])
    assert drawn == _by_the_rules(table, kind, lambda free: free[int(theirs.integers(len(free)))])
    assert len(drawn) == 600


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("annotations"), "not COCO instance annotations: KeyError: 'annotations'"),
        (lambda c: c.update(annotations=[]), "no image with annotations"),
        (lambda c: c["annotations"][0].update(category_id=99), "not COCO instance annotations: KeyError: 99"),
        (lambda c: c["images"][0].update(file_name="../out.jpg"), "leaves the data root"),
        (lambda c: c["images"][3].update(file_name="none.jpg"), "no such image: "),
    ],
)
def test_a_file_of_another_form_is_named(write: Write, change: Any, says: str) -> None:
    path, root = write(5, change=change)
    with refused(f"{path}: ", says):
        CocoSource(path, root).queries()


def test_what_does_not_fit_the_image_is_named(write: Write) -> None:
    path, root = write(3)
    source = CocoSource(path, root)
    query = source.queries()[0]
    Image.new("RGB", (9, 9)).save(Path(root) / query.image)
    with refused(f"{path}: record '{query.id}': {query.image} has 9 x 9 pixels, annotated for"):
        source.load(query)

    def other_size(content: dict[str, Any]) -> None:
        for a in content["annotations"]:
            a["segmentation"] = {"size": [2, 2], "counts": [0, 4]}

    path, root = write(3, change=other_size)
    source = CocoSource(path, root)
    with pytest.raises(DataError, match=r"cannot be drawn: made for \[2, 2\]"):
        source.load(source.queries()[0])


def test_missing_files_and_settings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none.json: cannot be read"):
        CocoSource(str(tmp_path / "none.json"), str(tmp_path)).queries()
    bad: list[Any] = [{"kinds": []}, {"negatives": []}, {"per_image": 0}, {"first": -1}, {"images": 0}]
    for settings in bad:
        with pytest.raises(DataError, match="CocoSource: needs"):
            CocoSource("a.json", "b", **settings)
