"""The extraction pipeline: exact masks stay exact, instances are united, and every outcome has its reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm_calibration.callbacks.contact_sheet import ContactSheet
from vlm_calibration.callbacks.regions import RegionWriter, row_of, write_rows
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.regions import RawBatch, RawQuery
from vlm_calibration.data.sources.base import with_regions
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.data.sources.parquet import ParquetSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.perturbation.masks import mask_to_rle, region_to_mask
from vlm_calibration.records import DataError, Query, Region
from vlm_calibration.regions.describer import Describer, Description
from vlm_calibration.regions.detector import Box, Detection, Detector
from vlm_calibration.regions.extraction import Pipeline, RegionGates
from vlm_calibration.regions.phrases import RuleDescriber
from vlm_calibration.regions.segmenter import Segmenter
from vlm_calibration.stages.regions import RegionExtractor

from ..trainers import plain_trainer
from .truth import ExactDetector, ExactSegmenter, Truth, enlarged

SCENES = 12
ALL = RegionGates(0.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(SCENES, factors=(1, 3))


@pytest.mark.parametrize(
    ("halves", "factor"), [(False, 1), (True, 3)], ids=["one box", "two boxes united, enlarged"]
)
def test_the_demo_s_scenes_come_out_exact(truth: Truth, halves: bool, factor: int) -> None:
    """With phrases from the questions and exact boxes and masks."""
    source = DemoSource("test", scenes=SCENES)
    segmenter = ExactSegmenter(truth)
    pipeline = Pipeline(RuleDescriber(), ExactDetector(truth, halves), segmenter, ALL)
    originals = source.queries()
    batch = [RawQuery(replace(q, objects=()), enlarged(source.load(q).image, factor)) for q in originals]
    found = set()
    for original, raw, extracted in zip(originals, batch, pipeline.extract(batch), strict=True):
        exact = [enlarged(m, factor) for m in source.load(original).evidence]
        assert extracted.query.objects == original.objects
        if original.answer == "No":
            assert (extracted.outcome, extracted.query.regions) == ("absent", ())
        elif exact[0].any():
            assert extracted.outcome == "found"
            assert raw.image is not None
            loaded = with_regions(extracted.query, raw.image)
            assert (len(loaded.evidence), loaded.distractors) == (1, ())
            assert np.array_equal(loaded.evidence[0], exact[0])
            x0, y0, x1, y1 = (int(v) for v in extracted.query.regions[0].box)
            assert loaded.evidence[0][y0:y1, x0:x1].sum() == loaded.evidence[0].sum()
            found.add(original.id)
    assert len(found) >= 2 * SCENES - 3
    assert segmenter.encoded <= SCENES, "an image of several queries is encoded once"


class Scripted(Describer, Detector, Segmenter):
    """A describer, detector and segmenter that return fixed phrases, boxes and masks."""

    def __init__(self, description: Description, boxes: Sequence[Detection] = (), masks: Any = ()) -> None:
        Describer.__init__(self)
        self.description = description
        self.boxes = list(boxes)
        self.masks = masks

    def load(self, device: torch.device) -> None:
        pass

    def describe(self, queries: Sequence[Query], images: Sequence[np.ndarray]) -> list[Description]:
        return [self.description for _ in queries]

    def detect(self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        return [[d for d in self.boxes if d.label in row] for row in phrases]

    def segment(self, images: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]]) -> list[np.ndarray]:
        rows = {d.box: i for i, d in enumerate(self.boxes)}
        return [np.stack([self.masks[rows[box]] for box in row]) for row in boxes]


def _mask(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    mask = np.zeros((20, 30), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


PLAIN = Query("q", "x.png", "A question?", "Yes", "yes_no")
IMAGE = np.zeros((20, 30, 3), dtype=np.uint8)
CORNER = (0.0, 0.0, 4.0, 4.0)


def _extract(
    scripted: Scripted, query: Query = PLAIN, gates: RegionGates = ALL, keep_known: bool = True
) -> Any:
    [result] = Pipeline(scripted, scripted, scripted, gates, keep_known).extract([RawQuery(query, IMAGE)])
    return result


def test_instances_of_a_phrase_are_united_and_phrases_kept_apart() -> None:
    boxes = [
        Detection("dog", (0.0, 0.0, 4.0, 4.0), 0.5),
        Detection("cat", (10.0, 10.0, 14.0, 14.0), 0.7),
        Detection("dog", (20.0, 2.0, 25.5, 8.0), 0.9),
        Detection("cat", (5.0, 5.0, 9.0, 9.0), 0.5),
    ]
    # The last is beside its box.
    masks = [_mask(0, 4, 0, 4), _mask(10, 13, 10, 14), _mask(2, 8, 20, 26), _mask(10, 12, 10, 12)]
    result = _extract(Scripted(Description(("dog", "cat", "cup"), ("bird",)), boxes, masks))
    assert result.outcome == "found"
    assert result.query.objects == ("dog", "cat", "cup", "bird")
    dog, cat = result.query.regions
    assert (dog.label, dog.box, dog.score) == ("dog", (0.0, 0.0, 26.0, 8.0), 0.9)
    assert np.array_equal(region_to_mask(dog, 20, 30), masks[0] | masks[2])
    assert np.array_equal(region_to_mask(cat, 20, 30), masks[1])


@pytest.mark.parametrize(
    ("gates", "mask", "reason"),
    [
        (RegionGates(min_score=0.6), _mask(0, 4, 0, 4), "score"),
        (ALL, _mask(10, 12, 10, 12), "empty"),
        (ALL, _mask(0, 0, 0, 0), "empty"),
    ],
)
def test_a_region_that_is_not_good_enough_is_kept_with_the_reason(
    gates: RegionGates, mask: np.ndarray, reason: str
) -> None:
    scripted = Scripted(Description(("dog",)), [Detection("dog", CORNER, 0.5)], [mask])
    result = _extract(scripted, gates=gates)
    assert (result.outcome, result.query.regions, result.query.objects) == ("rejected", (), ("dog",))
    [(region, why)] = result.rejected
    assert (why, region.label) == (reason, "dog")
    if reason == "empty":
        assert (region.mask, region.box) == (None, (0.0, 0.0, 4.0, 4.0))


def test_gates_at_their_limits() -> None:
    gates = RegionGates(0.5, 0.1, 0.4)
    expected = {(0.5, 0.1): None, (0.5, 0.4): None, (0.49, 0.2): "score", (0.9, 0.09): "small"}
    expected[0.9, 0.41] = "large"
    assert {region: gates.reason(*region) for region in expected} == expected
    for bad in ((1.1, 0, 1), (0, 0.5, 0.4), (0, 0, 1.2), (0, -0.1, 1)):
        with pytest.raises(DataError, match="gates: needs"):
            RegionGates(*bad)


def test_without_a_region() -> None:
    for description, outcome in (
        (Description((), ("dog",)), "absent"),
        (Description(()), "no phrase"),
        (Description(("dog",)), "not detected"),
    ):
        result = _extract(Scripted(description))
        objects = (*description.objects, *description.absent)
        assert (result.outcome, result.query.objects, result.query.regions) == (outcome, objects, ())


DOG = Region("dog", (1.0, 1.0, 5.0, 5.0), mask_to_rle(_mask(1, 5, 1, 5)))


def test_what_is_known_is_left_alone() -> None:
    scripted = Scripted(Description(("cat",)), [Detection("cat", CORNER, 0.5)], [_mask(0, 4, 0, 4)])
    known = replace(PLAIN, objects=("dog",), regions=(DOG,))
    assert _extract(scripted, known).outcome == "known"
    assert _extract(scripted, known).query == known
    again = _extract(scripted, replace(PLAIN, regions=(DOG,)), keep_known=False)
    assert [r.label for r in again.query.regions] == ["cat"]
    # Beside a distractor, and where one of two objects has its region.
    for objects in (("cat",), ("dog", "cat")):
        result = _extract(scripted, replace(PLAIN, objects=objects, regions=(DOG,)))
        assert result.outcome == "found"
        assert [r.label for r in result.query.regions] == ["cat", "dog"]


def test_objects_of_the_record_come_before_the_describer_s() -> None:
    scripted = Scripted(Description(("cat",), ("cup",)), [Detection("Dog", CORNER, 0.5)], [_mask(0, 4, 0, 4)])
    result = _extract(scripted, replace(PLAIN, objects=("Dog", "Cup")))
    assert result.query.objects == ("Dog", "Cup")
    assert [r.label for r in result.query.regions] == ["Dog"]
    for name in ("cup", "a Cup", "the cups"):
        assert _extract(scripted, replace(PLAIN, objects=(name,))).outcome == "absent"


def test_what_the_describer_says_is_absent_is_so_whatever_the_question(tmp_path: Path) -> None:
    asked = replace(PLAIN, question="Would one find a dog here?", answer="No", answer_type="yes_no")
    for described, objects, absent, presence in (
        (Description((), ("dog",)), ("dog",), ("dog",), "absent"),
        (Description(("dog",)), ("dog",), (), "unlocated"),
    ):
        result = _extract(Scripted(described), asked)
        assert (result.query.objects, result.query.absent) == (objects, absent)
        write_rows(tmp_path / "q.parquet", [[row_of(result)]])
        source = ParquetSource(str(tmp_path / "q.parquet"), images=DemoSource(scenes=1))
        [query] = source.queries()
        assert (query, source.presence(query)) == (result.query, presence)


def test_an_image_that_cannot_be_read_is_noted() -> None:
    scripted = Scripted(Description(("dog",)))
    pipeline = Pipeline(scripted, scripted, scripted, ALL)
    damaged, other = pipeline.extract([RawQuery(PLAIN, None, "x.png: damaged"), RawQuery(PLAIN, IMAGE)])
    assert (damaged.outcome, damaged.note) == ("unreadable", "x.png: damaged")
    assert (other.outcome, other.note) == ("not detected", None)
    assert pipeline.extract([]) == []


class Unlocated(DemoSource):
    """The demo's scenes as images without annotations."""

    def labels(self, query: Query) -> Sequence[str]:
        return ()


def _predict(data: PerturbedQueryDataModule, folder: Path, truth: Truth, **trainer_settings: Any) -> None:
    trainer = plain_trainer(folder, RegionWriter(), ContactSheet(queries=2), **trainer_settings)
    module = _extractor(truth)
    module.run_digest = "of these settings"
    trainer.predict(module, data, return_predictions=False)


def _extractor(truth: Truth) -> RegionExtractor:
    return RegionExtractor(RuleDescriber(), ExactDetector(truth), ExactSegmenter(truth), ALL)


def test_what_stops_an_extraction(truth: Truth, model_folder: str, tmp_path: Path) -> None:
    limited = PerturbedQueryDataModule(
        model_folder, train=Unlocated("test", scenes=3), workers=0, eval_batch_size=3
    )
    with pytest.raises(DataError, match=f"^{tmp_path}/shards: 2 of 3 shards are missing"):
        _predict(limited, tmp_path, truth, limit_predict_batches=1)
    assert not (tmp_path / "train.parquet").exists()
    with pytest.raises(DataError, match="data: needs 0 <= part < parts, found part 2 of 2"):
        PerturbedQueryDataModule(model_folder, parts=2, part=2)
    damaged = RawBatch([RawQuery(PLAIN, None, "x.png: damaged")], 0)
    with pytest.raises(DataError, match="^x.png: damaged$"):
        _extractor(truth).predict_step(damaged, 0)
    (tmp_path / "q.parquet").write_bytes(b"PAR1\n")
    with pytest.raises(DataError, match=r"q\.parquet: a Parquet file, expected JSON lines: .*ParquetSource$"):
        JsonlSource(str(tmp_path / "q.parquet")).queries()


@pytest.mark.parametrize("source", [DemoSource("test", scenes=3), Unlocated("test", scenes=3)])
def test_no_model_is_loaded_if_nothing_is_left(
    truth: Truth,
    model_folder: str,
    tmp_path: Path,
    source: DemoSource,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every query has its regions, or an earlier run extracted them."""
    loads: list[Any] = []
    monkeypatch.setattr(ExactDetector, "load", lambda *_: loads.append(1))
    for _ in range(2):
        data = PerturbedQueryDataModule(model_folder, train=source, workers=0)
        _predict(data, tmp_path, truth)
    summary = json.loads((tmp_path / "summary.json").read_text())
    if isinstance(source, Unlocated):
        assert loads == [1]
        assert (list(summary["files"]), summary["complete"]) == (["train.parquet"], [])
    else:
        assert loads == []
        assert (summary["queries"], summary["files"], summary["complete"]) == (0, {}, ["data.train"])
        assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
        assert "nothing to extract for data.train" in capsys.readouterr().out
