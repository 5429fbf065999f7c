"""Splitting a file by image: what stays together, which records are copied, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_calibration.commands.data import split
from vlm_calibration.data.sources.jsonl import SPLITS, JsonlSource
from vlm_calibration.data.sources.parquet import ParquetSource
from vlm_calibration.data.split import assign_queries
from vlm_calibration.records import DataError

from ..command_line import Capture, Ended
from .conftest import pattern, record


def _row(i: int, image: str, k: int = 0) -> dict[str, Any]:
    return record(f"{i}-{k}", image=image, answer="Yes" if (i + k) % 2 else "No")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """`all.jsonl` with 40 images of one to four queries each, 5 of them also as a copy and 5 encoded again."""
    folder = tmp_path / "my data"
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(40):
        pattern(i).save(folder / f"images/{i}.png")
        rows += [_row(i, f"images/{i}.png", k) for k in range(1 + i % 4)]
    for i in range(5):
        (folder / f"copy-{i}.png").write_bytes((folder / f"images/{i}.png").read_bytes())
        pattern(i + 5).resize((80, 60)).save(folder / f"again-{i}.jpg", quality=80)
        rows += [_row(100 + i, f"copy-{i}.png"), _row(200 + i, f"again-{i}.jpg")]
    styles: tuple[dict[str, Any], ...] = ({}, {"separators": (",", ":")}, {"ensure_ascii": False})
    texts = [json.dumps(row, **styles[i % 3]) for i, row in enumerate(rows)]
    file = folder / "all.jsonl"
    ends = ("\r\n", *[" \n"] * 6)
    file.write_bytes("".join(text + ends[i % 7] for i, text in enumerate(texts)).encode())
    return file


@pytest.fixture
def lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


def _read(folder: Path) -> dict[str, list[bytes]]:
    return {name: (folder / f"{name}.jsonl").read_bytes().splitlines(keepends=True) for name in SPLITS}


def _where(folder: Path) -> dict[str, str]:
    """The split of each image, which is in no other."""
    where: dict[str, str] = {}
    for name, part in _read(folder).items():
        assert all(where.setdefault(json.loads(line)["image"], name) == name for line in part)
    assert all(where[f"copy-{i}.png"] == where[f"images/{i}.png"] for i in range(5))
    return where


def test_lines_are_copied_as_they_are_and_images_stay_together(file: Path, lines: list[bytes]) -> None:
    """A byte order mark goes, and the last line gets its end."""
    last = json.dumps(_row(0, "images/0.png", 9)).encode()
    file.write_bytes(b"\xef\xbb\xbf" + b"".join(lines) + b"\n\n" + last)
    lines.append(last + b"\n")
    split(file)
    written = _read(file.parent)
    assert sorted(line for part in written.values() for line in part) == sorted(lines)
    for part in written.values():
        assert part == [line for line in lines if line in part], "in the order of the file"
    where = _where(file.parent)
    assert all(where[f"again-{i}.jpg"] == where[f"images/{i + 5}.png"] for i in range(5))
    split(file, near_identical=False, overwrite=True, shares=[0.25] * 4)
    where = _where(file.parent)
    assert any(where[f"again-{i}.jpg"] != where[f"images/{i + 5}.png"] for i in range(5))


def test_the_order_of_lines_makes_no_difference_and_the_seed_does(file: Path, lines: list[bytes]) -> None:
    def assigned(seed: int) -> dict[str, list[bytes]]:
        split(file, seed=seed, overwrite=True)
        return {name: sorted(part) for name, part in _read(file.parent).items()}

    first = assigned(0)
    file.write_bytes(b"".join(random.Random(1).sample(lines, len(lines))))
    assert assigned(0) == first
    assert assigned(1) != first


@given(
    st.lists(st.integers(-1, 60), min_size=4, max_size=200),
    st.lists(st.floats(0.02, 1), min_size=4, max_size=4),
    st.integers(0, 1000),
)
@settings(max_examples=60)
def test_each_split_has_its_share_of_the_groups(groups: list[int], weights: list[float], seed: int) -> None:
    shares = [w / sum(weights) for w in weights]
    number = len(set(groups) - {-1})
    if number < 4:
        with pytest.raises(DataError, match=f"{number} different images are too few for 4 splits"):
            assign_queries(np.array(groups), shares, seed)
        return
    splits = assign_queries(np.array(groups), shares, seed).tolist()
    members = [{g for g, s in zip(groups, splits, strict=True) if s == split} for split in range(4)]
    assert all(members)
    assert sum(map(len, members)) == number, "no group is in two splits"
    assert {s for g, s in zip(groups, splits, strict=True) if g < 0} <= {-1}
    for share, groups_of_split in zip(shares[1:], members[1:], strict=True):
        assert len(groups_of_split) <= share * number + 1


@pytest.mark.parametrize("embedded", [True, False])
def test_parquet_rows_keep_schema_metadata_and_values(tmp_path: Path, embedded: bool) -> None:
    names = [f"{i}.png" for i in range(30)]
    for i, name in enumerate(names):
        pattern(i).save(tmp_path / name)
    images: list[Any] = names
    if embedded:
        images = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in names]
    rows = [_row(i // 3, "", i % 3) | {"image": images[i // 3], "note": f"n{i}"} for i in range(90)]
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": "{}"})
    pq.write_table(table, tmp_path / "all.parquet", row_group_size=20)
    split(tmp_path / "all.parquet", shares=[0.4, 0.2, 0.2, 0.2])
    parts = {name: pq.read_table(tmp_path / f"{name}.parquet") for name in SPLITS}
    assert all(part.schema.equals(table.schema, check_metadata=True) for part in parts.values())
    rows_of = [row for part in parts.values() for row in part.to_pylist()]
    assert sorted(rows_of, key=itemgetter("note")) == sorted(table.to_pylist(), key=itemgetter("note"))
    seen: dict[str, str] = {}
    for name, part in parts.items():
        assert all(seen.setdefault(row["id"].split("-")[0], name) == name for row in part.to_pylist())
        assert len(ParquetSource(str(tmp_path / f"{name}.parquet")).queries()) == len(part)


def test_bad_records_stop_it_or_are_named(file: Path, lines: list[bytes], capsys: Capture) -> None:
    """A line that is not JSON, one about a missing image, and an image of two queries that is truncated."""
    image = file.parent / "images/1.png"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(DataError, match=r"record '1-0' and 1 more: .*damaged"):
        split(file)
    with file.open("ab") as out:
        out.write(b"{\n" + json.dumps(_row(7, "nowhere.png", 9)).encode() + b"\n")
    with pytest.raises(DataError, match=rf"all\.jsonl:{len(lines) + 1}: not JSON"):
        split(file)
    assert not any((file.parent / f"{name}.jsonl").exists() for name in SPLITS)
    split(file, on_bad_record="skip")
    printed = capsys.readouterr().out
    assert "left out 3 bad records or images:" in printed
    for culprit in (f"all.jsonl:{len(lines) + 1}", f"all.jsonl:{len(lines) + 2}", "record '1-0' and 1 more"):
        assert culprit in printed
    written = [line for part in _read(file.parent).values() for line in part]
    assert sorted(written) == sorted(line for line in lines if b"images/1.png" not in line)


def test_existing_files_stay_unless_they_may_go(file: Path) -> None:
    (file.parent / "test.jsonl").write_text("mine\n")
    with pytest.raises(DataError, match=r"test\.jsonl: exists already"):
        split(file)
    assert (file.parent / "test.jsonl").read_text() == "mine\n"
    assert not (file.parent / "train.jsonl").exists()
    split(file, overwrite=True)
    assert (file.parent / "test.jsonl").read_text() != "mine\n"
    source = file.replace(file.with_name("train.jsonl"))
    with pytest.raises(DataError, match="is the file to split"):
        split(source, overwrite=True)
    assert source.stat().st_size > 0


def test_all_files_are_written_or_none(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split(file)
    before = _read(file.parent)
    flushed: list[int] = []

    def full(file: int) -> None:
        flushed.append(file)
        if len(flushed) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left"):
        split(file, seed=5, overwrite=True)
    assert _read(file.parent) == before
    assert not list(file.parent.glob(".*"))


def test_paths_stay_valid_or_the_folder_is_refused(file: Path, tmp_path: Path, capsys: Capture) -> None:
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(DataError, match="leave out --out"):
        split(file, out=elsewhere)
    assert not elsewhere.exists()
    split(file, out=elsewhere, root=file.parent)
    assert f"set `root: {file.parent}`" in capsys.readouterr().out.replace("\n", " ")
    JsonlSource(str(elsewhere / "train.jsonl"), root=str(file.parent)).queries()
    deep = file.parent / "lists"
    deep.mkdir()
    split(file.rename(deep / "all.jsonl"), root=file.parent)
    assert len(JsonlSource(str(file.parent / "train.jsonl")).queries()) > 0
    assert not list(deep.glob("train*"))


def test_what_cannot_be_split_is_refused(file: Path) -> None:
    for shares in ([0.5, 0.5], [0.7, 0.1, 0.1, 0.2], [0.9, 0.1, 0.0, 0.0], [0.25] * 5):
        with pytest.raises(DataError, match="--shares"):
            split(file, shares=shares)
    for name, says in (("none.jsonl", "no such file"), ("images", "ends in"), ("all.csv", "ends in .jsonl")):
        with pytest.raises(DataError, match=says):
            split(file.parent / name)


def test_the_command_prints_a_table(call: Callable[..., Ended], file: Path) -> None:
    ended = call("data", "split", str(file), "--shares", "0.4", "0.2", "0.2", "0.2", "--seed", "3")
    assert (ended.status, ended.errors) == (0, []), ended.err
    sizes = {name: len(part) for name, part in _read(file.parent).items()}
    assert f"{sizes['test']} ({sizes['test'] / sum(sizes.values()):.1%})" in ended.out
    assert "largest group" in ended.out
    assert call("data", "split", str(file)).status == 1
