"""Regions of the sources of a configuration: which source needs a file, its name, and whose file a source reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from vlm_calibration.callbacks.regions import write_rows
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.regions import (
    Extraction,
    RawBatches,
    plan_extraction,
    read_with_regions,
    shards_of,
    split_with_regions,
)
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.data.sources.parquet import ParquetSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.records import DataError, LoadedImage, Query, Region


class Plain(QuerySource):
    """Questions about objects in grey images; every third object is absent.

    Args:
        name: begins the ids.
        located: the number of queries that come with a region.
        count: the number of queries.
    """

    def __init__(self, name: str = "a", located: int = 0, count: int = 6) -> None:
        self.name = name
        self.located = located
        self.count = count

    def queries(self) -> Sequence[Query]:
        region = Region("dog", (0.0, 0.0, 4.0, 4.0))
        return [
            Query(
                f"{self.name}{i}",
                f"{i}.png",
                "Is there a dog?",
                "No" if i % 3 == 2 else "Yes",
                "yes_no",
                regions=(region,) if i < self.located else (),
            )
            for i in range(self.count)
        ]

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


def test_each_noised_source_without_regions_has_a_file_named_after_its_settings() -> None:
    held_out = Plain("h")
    plan = plan_extraction(
        {
            "train": noised(Plain("t")),
            "validation": noised(Plain("v", located=6)),
            "levels": EvalSplit(held_out, "every_level"),
            "test.clean": EvalSplit(Plain("c")),
            "test.near": noised(Plain("n")),
            "test.far/off": noised(Plain("f")),
            "calibration.own": EvalSplit(Plain("h")),
        },
        keep_known=True,
    )
    assert {e.file: e.settings for e in plan.extractions} == {
        "train.parquet": ("train",),
        "calibration.parquet": ("levels",),
        "test.near.parquet": ("test.near",),
        "test.far_off.parquet": ("test.far/off",),
    }
    assert plan.complete == ["validation"]
    assert plan.extractions[1].source is held_out


def test_equal_sources_share_a_file_and_others_do_not() -> None:
    splits = {
        "train": noised(Plain("a")),
        "validation": noised(Plain("a")),
        "levels": noised(Plain("a", count=5)),
    }
    plan = plan_extraction(splits, keep_known=True)
    assert [(e.file, e.settings, e.contents.queries) for e in plan.extractions] == [
        ("train.parquet", ("train", "validation"), 6),
        ("levels.parquet", ("levels",), 5),
    ]


def test_known_regions_are_extracted_again_if_they_are_not_to_be_kept() -> None:
    splits = {"train": noised(Plain(located=6))}
    assert plan_extraction(splits, keep_known=True) == ([], ["train"])
    assert [e.file for e in plan_extraction(splits, keep_known=False).extractions] == ["train.parquet"]


def test_masks_that_only_the_source_knows_count_as_regions() -> None:
    """The demo's queries carry no regions."""
    assert plan_extraction({"train": noised(DemoSource(scenes=2))}, keep_known=True).complete == ["train"]


def test_without_any_source_there_is_nothing_to_plan(model_folder: str) -> None:
    with pytest.raises(DataError, match=r"data\.predict is not set, nor any of data\.train"):
        PerturbedQueryDataModule(model_folder).setup("predict")


def test_a_source_reads_its_own_file_whatever_the_file_is_called(tmp_path: Path) -> None:
    splits = {"train": noised(Plain("t")), "levels": noised(Plain("l"))}
    extract(tmp_path, *plan_extraction(splits, keep_known=True).extractions)
    (tmp_path / "levels.parquet").rename(tmp_path / "other.parquet")
    original = Plain("l")
    source = read_with_regions(tmp_path, "calibration.noised", original)
    queries = list(source.queries())
    assert [q.id for q in queries] == ["l0", "l1", "l2", "l3", "l4"], "the last image could not be read"
    loaded = source.load(queries[3])
    assert loaded.image[0, 0, 0] == 3, "the image is the original source's"
    assert loaded.evidence[0].sum() == 9
    assert source.wrong_answers(queries[0]) == original.wrong_answers(queries[0])


def test_of_equal_files_a_setting_reads_its_own(tmp_path: Path) -> None:
    """Two sources may ask the same queries about images of other folders."""
    for file, setting in (("a.parquet", "validation"), ("b.parquet", "train")):
        plan = plan_extraction({setting: noised(Plain())}, keep_known=True)
        extract(tmp_path, plan.extractions[0]._replace(file=file))
    source = read_with_regions(tmp_path, "train", Plain())
    assert isinstance(source, ParquetSource)
    assert source.path.name == "b.parquet"


def test_the_policy_about_bad_records_is_the_source_s(tmp_path: Path) -> None:
    extract(tmp_path, *plan_extraction({"train": noised(Plain())}, keep_known=True).extractions)
    original = Plain()
    original.on_bad_record = "skip"
    assert read_with_regions(tmp_path, "train", original).on_bad_record == "skip"


def test_a_file_of_other_queries_is_refused(tmp_path: Path) -> None:
    extract(tmp_path, *plan_extraction({"train": noised(Plain())}, keep_known=True).extractions)
    with pytest.raises(DataError) as caught:
        read_with_regions(tmp_path, "train", Plain(count=7))
    assert str(caught.value).startswith(f"{tmp_path}/train.parquet: extracted from 6 queries that data.train")


def test_a_missing_file_is_an_error_only_where_queries_need_it(tmp_path: Path) -> None:
    extract(tmp_path, *plan_extraction({"train": noised(Plain())}, keep_known=True).extractions)
    with pytest.raises(DataError) as caught:
        read_with_regions(tmp_path, "levels", Plain("b", located=3))
    for culprit in (f"{tmp_path}: ", "data.levels", "2 of 6 queries", "'b3', 'b4'", "'train.parquet'"):
        assert culprit in str(caught.value)
    complete = Plain("b", located=6)
    assert read_with_regions(tmp_path, "levels", complete) is complete
    assert read_with_regions(tmp_path / "nowhere", "levels", complete) is complete


def test_a_clean_split_reads_no_regions(tmp_path: Path) -> None:
    split = EvalSplit(Plain())
    assert split_with_regions(tmp_path, "test.clean", split) is split


def test_a_file_of_regions_made_elsewhere_is_no_one_s(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.parquet", [])
    with pytest.raises(DataError, match=r"no regions for data\.train.*'train\.parquet'"):
        read_with_regions(tmp_path, "train", Plain())


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
    extract(tmp_path, *data.plan_extraction().extractions)
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.parquet" for name in ("train", "levels", "test")}
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    assert {dataset[0, i].query.id for i in range(len(dataset))} == {f"t{i}" for i in range(5)}  # type: ignore[arg-type]
    data.calibration = None
    data.setup("test")
    ids = [query.id for query in data.sets["test"].queries]
    assert ids == [*(f"clean:c{i}" for i in range(6)), *(f"noised:n{i}" for i in range(5))]


def test_without_a_file_training_says_what_to_do(model_folder: str, tmp_path: Path) -> None:
    data = PerturbedQueryDataModule(model_folder, train=Plain("t"), regions=str(tmp_path))
    with pytest.raises(DataError, match=r"no regions for data\.train.*vlm-calibration predict"):
        data.setup("fit")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
@pytest.mark.parametrize("shard_size", [1, 3, 4, 100])
def test_shards_cover_every_query_of_all_sources_once(shard_size: int, batch_size: int) -> None:
    sources = [Plain("a", count=7), Plain("b", count=1), Plain("c", count=6)]
    shards = shards_of([7, 1, 6], shard_size)
    assert [shard.number for shard in shards] == list(range(len(shards)))
    batches = RawBatches(sources, shards, batch_size)
    loaded = [batches[i] for i in range(len(batches))]
    assert [row.query.id for batch in loaded for row in batch.rows] == [
        query.id for source in sources for query in source.queries()
    ]
    assert [batch.shard for batch in loaded if batch.last] == list(range(len(shards)))
    assert all(len({row.query.id[0] for row in batch.rows}) == 1 for batch in loaded), "one source a batch"
    assert max(len(batch.rows) for batch in loaded) <= min(batch_size, shard_size)


def test_a_process_without_shards_gets_one_empty_batch() -> None:
    batches = RawBatches([Plain()], [], 4)
    assert [batch.rows for batch in (batches[i] for i in range(len(batches)))] == [[]]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_share_the_shards_of_all_sources(model_folder: str, parts: int) -> None:
    def module(part: int) -> PerturbedQueryDataModule:
        data = PerturbedQueryDataModule(
            model_folder, train=Plain("t"), validation=Plain("v"), shard_size=4, parts=parts, part=part
        )
        data.setup("predict")
        data.leave_out([2])
        return data

    taken = [shard.number for part in range(parts) for shard in module(part).pending_shards]
    assert sorted(taken) == [0, 1, 3]
