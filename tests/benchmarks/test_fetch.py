"""Fetching POPE and AMBER, with a data set of the Hub and servers that are folders on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image

from vlm_calibration.cli import main
from vlm_calibration.commands import data as data_commands
from vlm_calibration.commands.data import KINDS
from vlm_calibration.data.sources.benchmark import AmberSource, PopeSource
from vlm_calibration.records import DataError

from ..data.conftest import encode


def _jpeg(seed: int) -> bytes:
    return encode(Image.new("RGB", (8, 8), (seed, 0, 0)), "JPEG")


def _image(number: int) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


def _question(i: int, number: int) -> dict[str, Any]:
    return {"question_id": i, "image": _image(number), "text": "Is there a dog in the image?", "label": "no"}


@pytest.fixture(autouse=True)
def _servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small POPE and AMBER: image 3 is in both of POPE's question files."""
    asked = {"question": "Is there a dog in the image?", "answer": "no"}
    images = [
        {"image_source": _image(n).removesuffix(".jpg"), "image": {"bytes": _jpeg(n), "path": None}}
        for n in (1, 2, 3)
    ]
    rows = [
        {"question_id": str(i), "category": kind, **asked, **image}
        for kind in KINDS
        for i, image in enumerate(images)
    ]
    hub = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hub)
    truths = [{"id": i, "type": "relation", "truth": "no"} for i in (1, 2)]
    queries = [{"id": i, "image": f"AMBER_{i}.jpg", "query": "Is it?"} for i in (1, 2)]
    aokvqa = [_question(0, 3), _question(1, 4)]
    served: dict[str, Any] = {f"pope/seem/aokvqa/aokvqa_pope_seem_{kind}.json": aokvqa for kind in KINDS}
    served["amber/annotations.json"] = truths
    served |= {f"amber/query/query_{name}.json": queries for name in ("all", "discriminative")}
    for name in ("POPE", "AMBER", "COCO"):
        monkeypatch.setattr(data_commands, name, str(tmp_path / "served" / name.lower()))
    for path, content in served.items():
        (tmp_path / "served" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "served" / path).write_text(json.dumps(content))
    (tmp_path / "served/coco").mkdir()
    (tmp_path / "served/coco" / _image(3)).write_bytes(b"not downloaded: the Hub has it")
    (tmp_path / "served/coco" / _image(4)).write_bytes(_jpeg(4))


@pytest.mark.parametrize("folder", ["a folder", "with files"])
def test_pope_is_where_the_preset_reads_it(tmp_path: Path, root: Path, folder: str) -> None:
    data = tmp_path / "data"
    if folder == "with files":
        (data / "pope").mkdir(parents=True)
        (data / "pope/coco_pope_random.json").write_text(json.dumps(_question(7, 1)) + "\n")
    assert main(["data", "fetch", "pope", "--data-root", str(data)]) == 0
    images, coco = str(data / "coco/val2014"), [str(data / f"pope/coco_pope_{kind}.json") for kind in KINDS]
    numbers = [[query.image for query in PopeSource(path, images).queries()] for path in coco]
    own = [_image(1)] if folder == "with files" else [_image(n) for n in (1, 2, 3)]
    assert numbers == [own, *[[_image(n) for n in (1, 2, 3)]] * 2]
    assert json.loads(Path(coco[1]).read_text().splitlines()[1]) == _question(1, 2)
    assert (data / "coco/val2014" / _image(3)).read_bytes() == _jpeg(3)
    settings = yaml.safe_load((root / "configs/eval/pope.yaml").read_text())["data"]
    for split in [*settings["test"].values(), *settings["calibration"].values()]:
        arguments = split["source"]["init_args"]
        assert (data / arguments["path"].removeprefix("${data_root}/")).is_file()
        assert arguments["root"] == "${data_root}/coco/val2014"

    aokvqa = str(data / "pope/aokvqa_pope_random.json")
    assert [q.image for q in PopeSource(aokvqa, images).queries()] == [_image(3), _image(4)]
    source = PopeSource(aokvqa, images, exclude=coco[1:])
    assert [q.image for q in source.queries()] == [_image(4)]
    assert source.counts.of(source.queries(), ["no"]).answers[None, "No", "No"] == 1
    assert len(source.answer_files([("No", 0.5)])["labels.jsonl"]) == 1
    with pytest.raises(DataError, match="image of every question"):
        PopeSource(aokvqa, images, exclude=[aokvqa]).queries()
    with pytest.raises(DataError, match="nowhere"):
        PopeSource(aokvqa, images, exclude=["nowhere.json"]).queries()


def test_an_interrupted_download_resumes_and_files_stay(tmp_path: Path) -> None:
    data, served = tmp_path / "data", tmp_path / "served/coco" / _image(4)
    content = served.read_bytes()
    served.unlink()
    assert main(["data", "fetch", "pope", "--data-root", str(data)]) == 1
    served.write_bytes(content)
    (data / "coco/val2014" / _image(1)).write_bytes(b"mine")
    assert main(["data", "fetch", "pope", "--data-root", str(data)]) == 0
    assert (data / "coco/val2014" / _image(1)).read_bytes() == b"mine"
    assert (data / "coco/val2014" / _image(4)).read_bytes() == content


def test_without_a_network_the_places_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert main(["data", "fetch", "pope", "--data-root", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    for place in ("pope/coco_pope_random.json", "pope/aokvqa_pope_popular.json", "coco/val2014"):
        assert f"{tmp_path / place}" in told


def test_amber_images_are_placed_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    assert main(["data", "fetch", "amber", "--data-root", str(data)]) == 1
    told = capsys.readouterr().err
    assert f"2 of 2 images are not in {data / 'amber/image'} ('AMBER_1.jpg', 'AMBER_2.jpg')" in told
    (data / "amber/image").mkdir()
    for number in (1, 2):
        (data / f"amber/image/AMBER_{number}.jpg").write_bytes(_jpeg(number))
    assert main(["data", "fetch", "amber", "--data-root", str(data)]) == 0
    files = ("query/query_discriminative.json", "annotations.json", "image")
    assert len(AmberSource(*(str(data / "amber" / file) for file in files)).queries()) == 2
