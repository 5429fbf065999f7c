"""The presets of published data on small files in the folders that they name: every part is read, and no image is in two parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_calibration.commands.data import read_data
from vlm_calibration.data.sources.shares import ImageShare

from ..command_line import Ended
from .published import GQA_QUESTIONS, SCENE_GRAPHS, VQA_ROWS, write_gqa, write_vqa

TRAIN_2014, VAL_2014 = (0.0, 0.998, 1.0), (0.0, 0.02, 0.12)
ONE_FILE = (0.0, 0.9, 0.92, 0.96, 1.0)


def names(pattern: str, limits: tuple[float, ...]) -> Iterator[int]:
    """Three numbers for each share between two limits, whose image, named by the pattern, is in it."""
    for begin, end in pairwise(limits):
        share = ImageShare(begin, end)
        yield from islice((i for i in count(1) if pattern.format(i) in share), 3)


def vqav2(root: Path) -> None:
    for split, limits in (("train2014", TRAIN_2014), ("val2014", VAL_2014)):
        rows = tuple(
            (10 * i + k, i, *row[2:])
            for i in names(f"COCO_{split}_{{:012d}}.jpg", limits)
            for k, row in enumerate(VQA_ROWS)
        )
        paths = write_vqa(root / "vqav2", rows, split)
        (root / "coco").mkdir(exist_ok=True)
        Path(paths[2]).rename(root / "coco" / split)


def gqa(root: Path) -> None:
    for split, prefix, limits in (
        ("train", "1", (0.0, 0.999, 1.0)),
        ("val", "2", (0.0, 0.04)),
        ("testdev", "n", (0.0, 1.0)),
    ):
        images = [f"{prefix}{i}" for i in names(f"{prefix}{{}}.jpg", limits)]
        questions = {
            f"{image}{key}": {**question, "imageId": image}
            for image in images
            for key, question in GQA_QUESTIONS.items()
            if question["imageId"] == "10"
        }
        folder = root / "gqa"
        written = write_gqa(folder, questions, dict.fromkeys(images, SCENE_GRAPHS["10"]))
        for name, path in (("questions", written[0]), ("sceneGraphs", written[2])):
            (folder / name).mkdir(exist_ok=True)
            Path(path).rename(folder / name / Path(path).name.replace("train", split))


def sharegpt(root: Path) -> None:
    records = []
    for i in names("images/{}.jpg", ONE_FILE):
        (root / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / f"images/{i}.jpg")
        spoken = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "No"}]
        records.append({"id": str(i), "image": f"images/{i}.jpg", "conversations": spoken})
    (root / "conversations.json").write_text(json.dumps(records))


def hf(root: Path) -> None:
    datasets = pytest.importorskip("datasets")
    root.mkdir()
    files = [f"{i}.png" for i in names("'{}.png'", ONE_FILE)]
    for file in files:
        Image.new("RGB", (8, 8)).save(root / file)
    columns = {"question": ["Is it red?"] * len(files), "answer": ["No"] * len(files), "image": files}
    datasets.Dataset.from_dict(columns).save_to_disk(root)


WRITERS: dict[str, Callable[[Path], None]] = {"vqav2": vqav2, "gqa": gqa, "sharegpt": sharegpt, "hf": hf}


def sources(preset: str, root: Path) -> dict[str, Any]:
    data = read_data(["--config", f"data/{preset}", "--data-root", str(root)])
    assert data.test is not None
    assert data.calibration is not None
    return {
        "train": data.train,
        "validation": data.validation,
        "levels": data.levels,
        "test": data.test["own"].source,
        "calibration": data.calibration["own"].source,
    }


@pytest.mark.parametrize("preset", WRITERS)
def test_parts_have_no_image_in_common(preset: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    WRITERS[preset](root)
    parts = sources(preset, root)
    images = {name: {str(part.image_file(q)) for q in part.queries()} for name, part in parts.items()}
    assert all(len(part) >= 3 for part in images.values())
    assert images["levels"] == images.pop("calibration")
    assert len(set.union(*images.values())) == sum(map(len, images.values()))
    for part in parts.values():
        assert part.load(part.queries()[0]).image.shape[2] == 3


def test_training_on_gqa_has_regions(tmp_path: Path) -> None:
    gqa(tmp_path / "data")
    parts = sources("gqa", tmp_path / "data")
    for name in ("train", "validation", "levels"):
        assert any(parts[name].has_evidence(q) for q in parts[name].queries()), name


@pytest.mark.parametrize("preset", WRITERS)
def test_inspect_counts_every_part(call: Callable[..., Ended], preset: str, tmp_path: Path) -> None:
    WRITERS[preset](tmp_path / "data")
    ended = call("data", "inspect", "--config", f"data/{preset}", "--data-root", str(tmp_path / "data"))
    assert (ended.status, ended.errors) == (0, []), ended.err
    for name in ("data.train", "data.validation", "data.test.own"):
        assert name in ended.out
    assert "yes_no" in ended.out or "no 100.0%" in ended.out


@pytest.mark.parametrize("preset", WRITERS)
def test_files_that_are_not_there_are_named(call: Callable[..., Ended], preset: str, tmp_path: Path) -> None:
    root = str(tmp_path / "none")
    ended = call("data", "inspect", "--config", f"data/{preset}", "--data-root", root)
    assert ended.status == 1
    assert root in ended.error()
