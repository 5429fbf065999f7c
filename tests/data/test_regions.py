"""Regions of the sources of a configuration: which source needs a file, its name, and whose file a source reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vlm_calibration.callbacks.regions import write_rows
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.regions import Extraction, RegionPlan, read_with_regions
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.data.sources.parquet import ParquetSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.records import DataError, LoadedImage, Query, Region


class Plain(QuerySource):
    """`count` questions about objects in grey images, whose ids begin with `name`; `located` of them come with a region.

    Every third object is absent.
    """

    def __init__(self, name: str = "a", located: int = 0, count: int = 6) -> None:
        self.name, self.located, self.count = name, located, count

    def queries(self) -> Sequence[Query]:
        queries = []
        for i in range(self.count):
            answer = "No" if i % 3 == 2 else "Yes"
            regions = (Region("dog", (0.0, 0.0, 4.0, 4.0)),) if i < self.located else ()
            image = f"{i}.png"
            queries.append(Query(f"{self.name}{i}", image, "Is there a dog?", answer, "yes_no", (), regions))
        return queries

    def load(self, query: Query) -> LoadedImage:
        return LoadedImage(np.full((8, 8, 3), int(query.image[0]), dtype=np.uint8), (), ())


def noised(source: QuerySource) -> EvalSplit:
    return EvalSplit(source, "drawn")


def extract(folder: Path, *extractions: Extraction) -> None:
    """Write the files of an extraction that finds a dog at the same place in every image but the last."""
    found = Region("dog", (1.0, 1.0, 4.0, 4.0))
    for extraction in extractions:
        rows = [asdict(replace(q, regions=(found,))) for q in extraction.source.queries()]
        write_rows(folder / extraction.file, [rows[:-1]], extraction.note)


def planned(keep_known: bool = True, shard_size: int = 4, **sources: QuerySource) -> RegionPlan:
    splits = {setting: noised(source) for setting, source in sources.items()}
    return RegionPlan(splits, shard_size, keep_known)


def test_each_noised_source_without_regions_has_a_file_named_after_its_first_setting() -> None:
    held_out = Plain("h")
    splits = {
        "train": noised(Plain("t")),
        "validation": noised(Plain("v", located=6)),
        "levels": EvalSplit(held_out, "every_level"),
        "test.clean": EvalSplit(Plain("c")),
        "test.far/off": noised(Plain("f")),
        "test.shorter": noised(Plain("t", count=5)),
        "calibration.own": EvalSplit(Plain("h")),
        "calibration.noised": noised(Plain("h")),
    }
    plan = RegionPlan(splits, 4, keep_known=True)
    assert {e.file: (e.settings, e.queries) for e in plan.extractions} == {
        "train.parquet": (("train",), 6),
        "levels.parquet": (("levels", "calibration.noised"), 6),
        "test.far%2Foff.parquet": (("test.far/off",), 6),
        "test.shorter.parquet": (("test.shorter",), 5),
    }
    assert plan.complete == ["validation"]
    assert plan.extractions[1].source is held_out


def test_known_regions_are_extracted_again_if_they_are_not_to_be_kept() -> None:
    known = Plain(located=6)
    assert planned(train=known).extractions == []
    assert [e.file for e in planned(keep_known=False, train=known).extractions] == ["train.parquet"]
    assert planned(train=DemoSource(scenes=2)).complete == ["train"], "masks that only the source knows count"


def test_a_source_reads_its_own_file_whatever_the_file_is_called(tmp_path: Path) -> None:
    extract(tmp_path, *planned(train=Plain("t"), levels=Plain("l")).extractions)
    (tmp_path / "levels.parquet").rename(tmp_path / "other.parquet")
    original = Plain("l")
    original.on_bad_record = "skip"
    source = read_with_regions(tmp_path, "calibration.noised", original)
    assert source.on_bad_record == "skip"
    queries = list(source.queries())
    assert [q.id for q in queries] == ["l0", "l1", "l2", "l3", "l4"], "the last image could not be read"
    loaded = source.load(queries[3])
    assert loaded.image[0, 0, 0] == 3, "the image is the original source's"
    assert loaded.evidence[0].sum() == 9
    assert source.wrong_answers(queries[0]) == original.wrong_answers(queries[0])


def test_of_equal_files_a_setting_reads_its_own(tmp_path: Path) -> None:
    """Two sources may ask the same queries about images of other folders."""
    for file, setting in (("a.parquet", "validation"), ("b.parquet", "train")):
        extract(tmp_path, planned(**{setting: Plain()}).extractions[0]._replace(file=file))
    source = read_with_regions(tmp_path, "train", Plain())
    assert isinstance(source, ParquetSource)
    assert source.path.name == "b.parquet"


def test_files_of_other_queries_or_made_elsewhere_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.parquet", [])
    with pytest.raises(DataError, match=r"no regions for data\.train.*'train\.parquet'"):
        read_with_regions(tmp_path, "train", Plain())
    extract(tmp_path, *planned(train=Plain()).extractions)
    with pytest.raises(DataError, match="^.*/train.parquet: extracted from 6 queries that data.train"):
        read_with_regions(tmp_path, "train", Plain(count=7))


def test_a_missing_file_is_an_error_only_where_queries_need_it(tmp_path: Path) -> None:
    extract(tmp_path, *planned(train=Plain()).extractions)
    says = "data.levels.*2 of 6 queries.*'b3', 'b4'.*'train.parquet'"
    with pytest.raises(DataError, match=f"^{tmp_path}: .*{says}"):
        read_with_regions(tmp_path, "levels", Plain("b", located=3))
    complete = Plain("b", located=6)
    assert read_with_regions(tmp_path, "levels", complete) is complete
    assert read_with_regions(tmp_path / "nowhere", "levels", complete) is complete


def test_training_and_evaluation_read_the_regions(model_folder: str, tmp_path: Path) -> None:
    data = PerturbedQueryDataModule(
        model_folder,
        train=Plain("t"),
        levels=Plain("l"),
        test={"clean": EvalSplit(Plain("c")), "noised": noised(Plain("n"))},
        calibration={"held": EvalSplit(Plain("h", count=1))},
        regions=str(tmp_path),
        workers=0,
    )
    with pytest.raises(DataError, match=r"no regions for data\.train.*vlm-calibration predict"):
        data.setup("fit")
    extract(tmp_path, *data.plan_extraction().extractions)
    assert {p.stem for p in tmp_path.iterdir()} == {"train", "levels", "test.noised"}
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    assert {dataset[0, i].query.id for i in range(len(dataset))} == {f"t{i}" for i in range(5)}  # type: ignore[arg-type]
    data.calibration = None
    data.setup("test")
    ids = [query.id for query in data.sets["test"].queries]
    assert ids == [*(f"clean:c{i}" for i in range(6)), *(f"noised:n{i}" for i in range(5))]


@pytest.mark.parametrize("shard_size", [1, 3, 4, 100])
def test_shards_cover_every_query_of_all_sources_once(shard_size: int) -> None:
    sources = {"train": Plain("a", count=7), "levels": Plain("b", count=1), "validation": Plain("c", count=5)}
    plan = planned(shard_size=shard_size, **sources)
    batches = [plan[number] for number in range(len(plan))]
    assert [batch.shard for batch in batches] == list(range(len(plan)))
    ids = [row.query.id for batch in batches for row in batch.rows]
    assert ids == [query.id for source in sources.values() for query in source.queries()]
    assert all(len({row.query.id[0] for row in batch.rows}) == 1 for batch in batches), "one source a batch"
    assert max(len(batch.rows) for batch in batches) <= shard_size


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_and_processes_share_the_shards_of_all_sources(model_folder: str, parts: int) -> None:
    batches = []
    sources = {"train": Plain("t"), "validation": Plain("v"), "parts": parts, "workers": 0}
    for part in range(parts):
        for rank in (0, 1):
            data = PerturbedQueryDataModule(model_folder, **sources, eval_batch_size=4, part=part)  # type: ignore[arg-type]
            data.setup("predict")
            data.region_plan.finished = {2}
            data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
            batches += list(data.predict_dataloader())
    assert sorted(batch.shard for batch in batches if batch.rows) == [0, 1, 3]
    assert len(batches) == max(2 * parts, 3), "a process without a shard has an empty batch"
