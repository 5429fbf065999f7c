"""`vlm-calibration data inspect`: counts of every kind of source, and the first bad records by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.records import DataError
from vlm_calibration.reporting.inspection import inspect_source

from ..command_line import Run, instance


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """Six usable queries over images of two sizes, one image truncated, and three bad records."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name, size in (("wide.png", (60, 40)), ("small.jpg", (20, 20)), ("cut.jpg", (60, 40))):
        Image.fromarray(pixels).resize(size).save(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:200])
    region = {"label": "dog", "box": [0, 0, 30, 40]}
    dog = {"objects": ["dog"], "regions": [region], "category": "a/b"}

    def row(i: int, image: str, answer: str, kind: str, **more: Any) -> dict[str, Any]:
        asked = {"id": str(i), "image": image, "question": "So?", "answer": answer, "answer_type": kind}
        return {**asked, **more}

    rows: list[Any] = [
        row(1, "wide.png", "Yes", "yes_no", **dog),
        row(2, "wide.png", "yes.", "yes_no", **{**dog, "regions": [{**region, "box": [-9, 0, 30, 40]}]}),
        row(3, "small.jpg", "No", "yes_no", objects=["cat"], question="Is there a cat?"),
        row(4, "small.jpg", "red", "short", category="c"),
        row(5, "small.jpg", "A cat [that] sleeps", "open"),
        row(6, "cut.jpg", "blue", "short"),
        row(7, "none.png", "blue", "short"),
        row(1, "wide.png", "Yes", "yes_no"),
        "{",
    ]
    path = tmp_path / "queries.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_counts_of_a_file(jsonl: Path) -> None:
    rows, bad, unloadable = inspect_source(JsonlSource(str(jsonl)), sample=100)
    assert dict(rows) == {
        "queries": "6",
        "yes_no answers": "3: yes 66.7%, no 33.3%",
        "short answers": "2: red 50.0%, blue 50.0%",
        "open answers": "1: median 4 words, at most 4",
        "categories": "a/b 2, c 1",
        "with a region of their object": "33.3%",
        "about an absent object": "1: '3'",
        "without a region, and stay untouched": "3: '4', '5', '6'",
        "image sizes (6 opened)": "20..60 x 20..40, median 20 x 20",
        "regions' share of the image": "median 50.0%, 80% within 50.0% to 50.0%",
        "with a region that leaves the image": "1 of 6 opened: '2'",
        "bad records": "3",
        "images or regions that cannot be loaded": "1",
    }
    assert [m.split(": ", 1)[0] for m in bad] == [f"{jsonl}:{n}" for n in (7, 8, 9)]
    assert list(unloadable) == [str(jsonl.with_name("cut.jpg"))]
    assert "cut.jpg" in unloadable[str(jsonl.with_name("cut.jpg"))]
    few = dict(inspect_source(JsonlSource(str(jsonl)), sample=2)[0])
    assert few["queries"] == "6"
    assert "image sizes (2 opened)" in few


@pytest.mark.parametrize(("scale", "says"), [(1, []), (1 / 60, ["2 of the bad records"])])
def test_boxes_that_are_normalised_are_counted(jsonl: Path, scale: float, says: list[str]) -> None:
    lines = []
    for line in map(json.loads, jsonl.read_text().splitlines()[:6]):
        for region in line.get("regions", ()):
            region["box"] = [scale * side for side in region["box"]]
        lines.append(json.dumps(line))
    jsonl.write_text("\n".join(lines))
    rows, *_ = inspect_source(JsonlSource(str(jsonl)), sample=1)
    assert [text for heading, text in rows if "box" in heading] == says


def test_a_source_of_only_bad_records_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("{\n")
    with pytest.raises(DataError, match=f"no usable query in this file: {path}:1: not JSON"):
        inspect_source(JsonlSource(str(path)), sample=3)


@pytest.fixture
def config(jsonl: Path, tmp_path: Path) -> Path:
    source = instance("data.sources.jsonl.JsonlSource", path=str(jsonl))
    demo = instance("demo.source.DemoSource", scenes=3)
    data = {"train": source, "levels": demo, "test": {"clean": {"source": demo}}, "predict": demo}
    other = {"trainer": {"max_steps": 3}, "model": {"class_path": "no.such.Model"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**other, "data": data}))
    return path


def test_the_command_prints_every_source(call: Run, config: Path, jsonl: Path) -> None:
    ended = call("data", "inspect", "--config", str(config), "--data.predict.init_args.scenes", "5")
    assert (ended.status, ended.errors) == (0, []), ended.err
    for name in ("data.train", "data.levels", "data.test.clean", "data.predict"):
        assert f" {name} " in ended.out
    assert ended.out.count("┌") == 1, "one table"
    assert "yes 66.7%, no 33.3%" in ended.out
    assert " 15 " in ended.out, "queries of data.predict"
    assert f"\n{jsonl}:7: record '7': no such image: " in ended.out


@pytest.mark.parametrize("samples", [1, 200], ids=["not opened", "opened"])
def test_a_broken_image_is_named_once(call: Run, jsonl: Path, tmp_path: Path, samples: int) -> None:
    """Whatever number of queries and sources it is in, and whether it is opened for the counts or for the comparison alone."""
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()[:6]]
    copies = [json.dumps({**row, "id": f"{copy}-{row['id']}"}) for copy in range(3) for row in rows]
    for name in ("train", "validation", "calibration", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(copies))
    arguments = ("--config", "data/jsonl", "--data-root", str(tmp_path), "--samples", str(samples))
    assert call("data", "inspect", *arguments).out.count(str(tmp_path / "cut.jpg")) == 1


def test_shipped_overlays_are_understood(call: Run) -> None:
    missing = {"jsonl": "train.jsonl", "parquet": "train.parquet", "coco": "coco_pope_random"}
    for overlay, file in missing.items():
        assert file in call("data", "inspect", "--config", f"data/{overlay}").error()


@pytest.mark.parametrize(
    ("arguments", "says", "status"),
    [
        (["inspect"], "nothing to inspect: give --config FILE", 2),
        (["inspect", "--config", "config.yaml", "--data.trian", "3"], "did you mean --data.train?", 2),
        (["inspect", "--config", "config.yaml", "--samples", "0"], "--samples: expected a whole number", 2),
        (["inspect", "--config", "empty.yaml"], "nothing to inspect", 1),
        (["inspect", "--config", "unknown.yaml"], "trian", 2),
    ],
)
def test_mistakes_in_the_call(
    call: Run, config: Path, tmp_path: Path, arguments: list[str], says: str, status: int
) -> None:
    (tmp_path / "empty.yaml").write_text("trainer: {max_steps: 3}\n")
    (tmp_path / "unknown.yaml").write_text("data: {trian: 3}\n")
    ended = call("data", *arguments)
    assert says in ended.error()
    assert ended.status == status
