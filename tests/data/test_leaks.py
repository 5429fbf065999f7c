"""Images that splits share: in one place, as a copy, or encoded again; and which splits may share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from vlm_calibration.commands.data import inspect
from vlm_calibration.data.near_duplicates import Leak, LeakReport, find_leaks
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.data.sources.parquet import ParquetSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.errors import CommandError
from vlm_calibration.records import DataError

from .conftest import pattern, png


def _rows(names: Iterable[str]) -> list[dict[str, Any]]:
    return [
        {"id": str(i), "image": name, "question": "A dog?", "answer": "Yes", "answer_type": "yes_no"}
        for i, name in enumerate(names)
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., JsonlSource]:
    """Write NAME.jsonl about images beside it; those that do not exist are made, image N.png from seed N."""

    def source(name: str, *images: str) -> JsonlSource:
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        for image in images:
            if not (path.parent / image).exists():
                pattern(int(image.removesuffix(".png"))).save(path.parent / image)
        path.write_text("".join(json.dumps(row) + "\n" for row in _rows(images)))
        return JsonlSource(str(path))

    return source


def _leaks(**sources: QuerySource) -> LeakReport:
    return find_leaks({f"data.{name.replace('__', '.')}": s for name, s in sources.items()})


def test_each_image_counts_for_its_closest_kind(write: Callable[..., JsonlSource], tmp_path: Path) -> None:
    train = write("train", *(f"{i}.png" for i in range(10)))
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    pattern(2).resize((96, 72)).save(tmp_path / "again.jpg", quality=80)
    test = write("test", "20.png", "0.png", "copy.png", "again.jpg", "21.png", "1.png")
    report = _leaks(train=train, test__clean=test)
    assert report.images == {"train": 10, "test": 6}
    assert report.leaks == (
        Leak("same file", "train", "test", 2, ("0.png", "1.png")),
        Leak("same content", "train", "test", 1, ("1.png = copy.png",)),
        Leak("near-identical", "train", "test", 1, ("2.png = again.jpg",)),
    )


def test_splits_of_one_role_may_share(write: Callable[..., JsonlSource]) -> None:
    sources = {
        name: write(name.replace("__", "-"), "1.png", "2.png")
        for name in ("levels", "calibration__a", "calibration__b", "predict")
    }
    tests = {name: write(name, "3.png") for name in ("test__random", "test__popular")}
    report = _leaks(**sources, **tests)
    assert report.images == {"calibration": 2, "test": 1}
    assert report.leaks == ()
    roles = ("train", "validation", "calibration", "test")
    report = _leaks(**{role: write(role, "1.png") for role in roles})
    assert [(leak.first, leak.second) for leak in report.leaks] == list(combinations(roles, 2))


def _parquet(path: Path, seeds: Iterable[int]) -> ParquetSource:
    """A file with embedded images."""
    images = [{"bytes": png(pattern(seed)), "path": None} for seed in seeds]
    rows = [row | {"image": image} for row, image in zip(_rows(map(str, seeds)), images, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return ParquetSource(str(path))


def test_embedded_images_are_compared_by_content_not_by_row(tmp_path: Path) -> None:
    train, test = _parquet(tmp_path / "train.parquet", [1, 2, 3]), _parquet(tmp_path / "t.parquet", [4, 5, 3])
    assert _leaks(train=train, test=test).leaks == (
        Leak("same content", "train", "test", 1, ("row-2 = row-2",)),
    )
    [leak] = _leaks(train=train, validation=ParquetSource(str(tmp_path / "train.parquet"))).leaks
    assert (leak.kind, leak.images) == ("same file", 3)


def test_one_name_in_two_folders_is_no_leak(write: Callable[..., JsonlSource], tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    pattern(5).save(tmp_path / "b/1.png")
    assert _leaks(train=write("a/train", "1.png"), test=write("b/test", "1.png")).leaks == ()


def test_regions_of_other_sources_and_drawn_images(write: Callable[..., JsonlSource], tmp_path: Path) -> None:
    images = write("all", "1.png", "2.png", "3.png")
    pq.write_table(pa.Table.from_pylist(_rows(["1.png", "2.png"])), tmp_path / "regions.parquet")
    train = ParquetSource(str(tmp_path / "regions.parquet"), images=images)
    report = _leaks(train=train, test=images)
    assert [(leak.kind, leak.images) for leak in report.leaks] == [("same file", 2)]
    demo = _leaks(train=DemoSource("train", scenes=40), test=DemoSource("test", scenes=40))
    assert demo == LeakReport({"train": 40, "test": 40}, (), {})


def test_an_image_that_cannot_be_read_is_named(write: Callable[..., JsonlSource], tmp_path: Path) -> None:
    train, test = write("train", "1.png", "2.png"), write("test", "3.png", "2.png")
    for source in (train, test):
        source.queries()
    (tmp_path / "2.png").write_bytes(b"")
    report = _leaks(train=train, test=test)
    assert list(report.unreadable) == [str(tmp_path / "2.png")]
    assert "not an image" in report.unreadable[str(tmp_path / "2.png")]
    assert [leak.kind for leak in report.leaks] == ["same file"]


@pytest.fixture
def config(tmp_path: Path, write: Callable[..., JsonlSource]) -> str:
    """train and test share image 1."""
    write("train", "1.png", "2.png")
    write("test", "1.png", "3.png")
    jsonl = "vlm_calibration.data.sources.jsonl.JsonlSource"
    train, test = (
        {"class_path": jsonl, "init_args": {"path": str(tmp_path / f"{name}.jsonl")}}
        for name in ("train", "test")
    )
    data = {"train": train, "validation": test, "test": {"x": {"source": test}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return str(tmp_path / "config.yaml")


def test_the_command_reports_and_fails_only_if_strict(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect("--config", config)
    assert "1 of 2" in capsys.readouterr().out
    with pytest.raises(CommandError) as caught:
        inspect("--config", config, strict=True)
    assert caught.value.status == 1
    capsys.readouterr()
    inspect("--config", config, strict=True, leaks=False)
    assert "share" not in capsys.readouterr().out


def test_missing_files_are_named_after_the_others_are_shown(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.jsonl").rename(tmp_path / "test.parquet")
    with pytest.raises(DataError) as caught:
        inspect("--config", config)
    assert str(caught.value).count(f"{tmp_path}/test.jsonl") == 2
    out = capsys.readouterr().out
    assert "data.train" in out
    assert f"data.test.x: {tmp_path}/test.jsonl: no such file" in out
    assert "`--config data/parquet`" in out
