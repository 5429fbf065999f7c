"""The COCO source: masks compared with pycocotools, absent objects with POPE's published rules, answers with the boxes."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from vlm_calibration.data.sources.coco import SIDES, AbsentObjects, CocoSource, object_mask, read_instances
from vlm_calibration.records import DataError

NAMES = ("person", "dog", "traffic light", "orange", "sheep", "knife", "bus", "bench", "kite", "umbrella")
HEIGHT, WIDTH = 48, 64


def _polygon(rng: np.random.Generator) -> list[float]:
    x, y = rng.uniform(4, WIDTH - 4), rng.uniform(4, HEIGHT - 4)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
    radii = rng.uniform(3, 14, 7)
    points = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], axis=1)
    return [round(float(v), 2) for v in points.ravel()]


def _uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.T.reshape(-1)
    change = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *change, flat.size]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": runs if not flat[0] else [0, *runs]}


def _segmentation(kind: str, rng: np.random.Generator) -> tuple[Any, np.ndarray]:
    """A segmentation of one kind, and its mask by pycocotools."""
    if kind == "polygons":
        polygons = [_polygon(rng) for _ in range(int(rng.integers(1, 4)))]
        return polygons, rle.decode(rle.merge(rle.frPyObjects(polygons, HEIGHT, WIDTH)))
    mask = (rng.random((HEIGHT, WIDTH)) < 0.1).astype(np.uint8)
    if kind == "crowd":
        return _uncompressed(mask), mask
    encoded = rle.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}, mask


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Write random images and their `instances.json`; return its path and the image folder."""

    def written(
        images: int = 30, seed: int = 0, change: Callable[[dict[str, Any]], None] | None = None
    ) -> Any:
        rng = np.random.default_rng(seed)
        content: dict[str, Any] = {
            "categories": [{"id": 10 + i, "name": n} for i, n in enumerate(NAMES)],
            "images": [],
            "annotations": [],
        }
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for i in range(images):
            file = f"{i:04d}.jpg"
            Image.new("RGB", (WIDTH, HEIGHT), "grey").save(folder / file)
            content["images"].append({"id": 500 + i, "file_name": file, "height": HEIGHT, "width": WIDTH})
            for _ in range(int(rng.integers(1, 8))):
                kind = ("polygons", "polygons", "crowd", "rle")[int(rng.integers(4))]
                segmentation, mask = _segmentation(kind, rng)
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": 500 + i,
                        "category_id": 10 + int(rng.integers(len(NAMES)) ** 2 // len(NAMES)),
                        "segmentation": segmentation,
                        "iscrowd": int(kind == "crowd"),
                        "bbox": [float(v) for v in rle.toBbox(rle.encode(np.asfortranarray(mask)))],
                    }
                )
        if change:
            change(content)
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        return str(path), str(folder)

    return written


def test_masks_are_those_of_pycocotools(
    write: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path, root = write()
    coco = COCO(path)
    capsys.readouterr()
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    pictures = {p.file: p for p in read_instances(Path(path))}
    kinds = Counter(type(a["segmentation"]).__name__ + str(a["iscrowd"]) for a in coco.anns.values())
    assert min(kinds.values()) > 10
    assert set(kinds) == {"list0", "dict0", "dict1"}
    source = CocoSource(path, root)
    masks: dict[tuple[str, str], np.ndarray] = {}
    for image in coco.imgs.values():
        for a in coco.imgToAnns[image["id"]]:
            key = (image["file_name"], names[a["category_id"]])
            masks[key] = masks.get(key, np.zeros((HEIGHT, WIDTH), bool)) | coco.annToMask(a).astype(bool)
    for (file, name), mask in masks.items():
        assert np.array_equal(object_mask(pictures[file], name), mask)
    assert sum(len(p.objects) for p in pictures.values()) == len(masks)
    for query in source.queries():
        loaded = source.load(query)
        evidence = [masks[query.image, n] for n in query.objects if (query.image, n) in masks]
        assert sorted(m.tobytes() for m in loaded.evidence) == sorted(m.tobytes() for m in evidence)
        distractors = {n for f, n in masks if f == query.image} - set(query.objects)
        assert len(loaded.distractors) == len(distractors)
        assert source.has_evidence(query) == bool(evidence)


def test_questions_are_true_to_the_annotations(write: Callable[..., Any]) -> None:
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
            true = {
                SIDES[0]: ax + aw <= bx,
                SIDES[1]: bx + bw <= ax,
                SIDES[2]: ay + ah <= by,
                SIDES[3]: by + bh <= ay,
            }
            assert query.answer == ("Yes" if true[side] else "No")
            opposite_side = SIDES[SIDES.index(side) ^ 1]
            assert true[side] != true[opposite_side], "one of the two sides is right"
        else:
            assert (query.objects[0] in picture.objects) == (query.answer == "Yes")
            assert query.objects[0] in query.question
    present, absent = answers["existence", "Yes"], answers["existence", "No"]
    assert present == absent > 100
    assert 0.3 < answers["spatial", "Yes"] / (answers["spatial", "Yes"] + answers["spatial", "No"]) < 0.7
    assert {q.question for q in queries if q.category == "counting"} >= {
        "How many people are there in the image?",
        "How many sheep are there in the image?",
        "How many dogs are there in the image?",
    }
    assert "Is there an orange in the image?" in {q.question for q in queries}


def test_the_same_queries_every_time_and_another_seed_draws_others(write: Callable[..., Any]) -> None:
    path, root = write(20)
    first = list(CocoSource(path, root).queries())
    assert list(pickle.loads(pickle.dumps(CocoSource(path, root))).queries()) == first
    assert list(CocoSource(path, root, seed=1).queries()) != first
    few = CocoSource(path, root, images=5, kinds=["counting"], per_image=1).queries()
    assert len({q.image for q in few}) == len(few) <= 5
    assert {q.category for q in few} == {"counting"}


def test_images_of_a_benchmark_are_left_out(write: Callable[..., Any], tmp_path: Path) -> None:
    def renamed(content: dict[str, Any]) -> None:
        for i, image in enumerate(content["images"]):
            new = f"{i:012d}.jpg"
            (tmp_path / "images" / image["file_name"]).rename(tmp_path / "images" / new)
            image["file_name"] = new

    path, root = write(6, change=renamed)
    questions = tmp_path / "coco_pope.json"
    questions.write_text(
        '{"image": "COCO_val2014_000000000002.jpg"}\n{"image": "COCO_val2014_000000000004.jpg"}\n'
    )
    source = CocoSource(path, root, exclude=[str(questions)])
    assert {q.image for q in source.queries()} == {f"{i:012d}.jpg" for i in (0, 1, 3, 5)}
    questions.write_text("nothing of the kind 0000000000021\n")
    with pytest.raises(DataError, match="names no image by a number of twelve digits"):
        CocoSource(path, root, exclude=[str(questions)]).queries()


def _by_the_rules(table: list[list[str]], kind: str, samples: int, choose: Callable[[list[str]], str]) -> Any:
    """POPE's questions about images in order, reimplemented from the paper and its official generator."""
    frequency: dict[str, int] = {}
    for objects in table:
        for name in objects:
            frequency[name] = frequency.get(name, 0) + 1
    together: dict[str, dict[str, int]] = {}
    for objects in table:
        for name in objects:
            for neighbour in objects:
                if neighbour != name:
                    together.setdefault(name, {}).setdefault(neighbour, 0)
                    together[name][neighbour] += 1
    asked = []
    for objects in table:
        history: list[str] = []
        for present in objects[:samples]:
            history.append(present)
            ranked = {
                "random": [],
                "popular": sorted(frequency, key=lambda n: -frequency[n]),
                "adversarial": sorted(together.get(present, {}), key=lambda n, p=present: -together[p][n]),
            }[kind]
            free = [n for n in ranked if n not in history and n not in objects]
            absent = free[0] if free else choose([n for n in frequency if n not in history + objects])
            history.append(absent)
            asked.append((present, absent))
    return asked


@pytest.mark.parametrize("kind", ["random", "popular", "adversarial"])
def test_absent_objects_follow_the_official_rules(kind: str) -> None:
    rng = np.random.default_rng(1)
    weights = 1 / np.arange(1, 31)
    names = [f"object {i}" for i in range(30)]
    table = [
        list(rng.choice(names, size=int(rng.integers(3, 9)), replace=False, p=weights / weights.sum()))
        for _ in range(200)
    ]
    ours, theirs = np.random.default_rng(7), np.random.default_rng(7)
    expected = _by_the_rules(table, kind, 3, lambda free: free[int(theirs.integers(len(free)))])
    absent = AbsentObjects(table)
    drawn = []
    for objects in table:
        taken = list(objects)
        for present in objects[:3]:
            missing = absent.draw(kind, present, taken, ours)  # type: ignore[arg-type]
            assert missing is not None
            taken.append(missing)
            drawn.append((present, missing))
    assert drawn == expected
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
def test_a_file_of_another_form_is_named(write: Callable[..., Any], change: Any, says: str) -> None:
    path, root = write(5, change=change)
    with pytest.raises(DataError) as caught:
        CocoSource(path, root).queries()
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)


def test_what_does_not_fit_the_image_is_named(write: Callable[..., Any]) -> None:
    path, root = write(3)
    source = CocoSource(path, root)
    query = source.queries()[0]
    Image.new("RGB", (9, 9)).save(Path(root) / query.image)
    with pytest.raises(
        DataError, match=f"record '{query.id}': {query.image} has 9 x 9 pixels, annotated for"
    ):
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


def test_positions_without_overlap_share_no_image(write: Callable[..., tuple[str, str]]) -> None:
    path, root = write(30)
    whole = {q.image for q in CocoSource(path, root, kinds=["counting"]).queries()}
    parts = [
        {q.image for q in CocoSource(path, root, kinds=["counting"], first=first, images=count).queries()}
        for first, count in ((0, 10), (10, 5), (15, None))
    ]
    assert set.union(*parts) == whole
    assert sum(map(len, parts)) == len(whole)
    with pytest.raises(DataError, match=f"{path}: first: 30 of 30 annotated images"):
        CocoSource(path, root, first=30).queries()
