"""The RLAIF-V source: the preferred response is the gold answer, the rejected one a wrong answer, images are embedded."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm_calibration.data.sources.rlaif_v import RlaifVSource
from vlm_calibration.records import DataError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = ("ds_name", "question", "chosen", "rejected", "origin_dataset", "origin_split", "image_path")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows with the columns of the data set to two files of a folder."""
    schema = pa.schema([*((n, pa.string()) for n in TEXTS), ("image", IMAGE), ("idx", pa.int64())])

    def row(i: int, **changes: Any) -> dict[str, Any]:
        file = BytesIO()
        Image.new("RGB", (6, 4), (i, 0, 0)).save(file, "JPEG", quality=100)
        plain = {
            "ds_name": "RLAIF-V",
            "question": f"What is in picture {i}?",
            "chosen": f"A dog, {i} years old.",
            "rejected": f"A cat, {i} years old.",
            "origin_dataset": ("LCS-558K", "COCO")[i % 2],
            "image": {"bytes": file.getvalue(), "path": f"{i}.jpg"},
            "idx": i,
        }
        return {**plain, **changes}

    def written(*changes: dict[str, Any]) -> str:
        rows = [row(i, **change) for i, change in enumerate(changes)]
        for name, part in (("a.parquet", rows[:3]), ("b.parquet", rows[3:])):
            pq.write_table(pa.Table.from_pylist(part, schema=schema), tmp_path / name, row_group_size=2)
        return str(tmp_path)

    return written


@pytest.mark.parametrize("unpacked", [None, "unpacked"])
def test_queries_and_images(write: Callable[..., str], tmp_path: Path, unpacked: str | None) -> None:
    folder = tmp_path / unpacked if unpacked else None
    source = RlaifVSource(write(*[{}] * 5), unpacked=str(folder) if folder else None)
    queries = source.queries()
    assert [q.id for q in queries] == [f"rlaif-v-{i}" for i in range(5)]
    assert queries[3].question == "What is in picture 3?"
    assert queries[3].answer == "A dog, 3 years old."
    assert (queries[3].answer_type, queries[3].category) == ("open", "COCO")
    assert source.wrong_answers(queries[3]) == ["A cat, 3 years old."]
    for i in (4, 0, 3, 1, 2, 0):
        loaded = source.load(queries[i])
        assert loaded.image.shape == (4, 6, 3)
        assert abs(int(loaded.image[0, 0, 0]) - i) <= 1
        assert loaded.evidence == loaded.distractors == ()
        assert not source.has_evidence(queries[i])


def test_rows_that_are_no_queries(write: Callable[..., str]) -> None:
    path = write(
        {}, {"chosen": " "}, {"question": None}, {"chosen": "♥"}, {"rejected": None}, {"chosen": "..."}
    )
    with pytest.raises(DataError, match="row 1: 'answer' must be a non-empty string"):
        RlaifVSource(path).queries()
    source = RlaifVSource(path, on_bad_record="skip")
    with pytest.warns(UserWarning, match="left out 3 of 6 records"):
        queries = source.queries()
    assert [q.id for q in queries] == ["rlaif-v-0", "rlaif-v-3", "rlaif-v-4"]
    assert source.wrong_answers(queries[2]) == []
    assert source.load(queries[2]).image.shape == (4, 6, 3)


def test_an_image_that_cannot_be_read(write: Callable[..., str]) -> None:
    source = RlaifVSource(write({"image": {"bytes": b"no", "path": ""}}, {"image": None}))
    for query, says in zip(
        source.queries(), ("row-0: not an image", "row-1 holds no image bytes"), strict=True
    ):
        with pytest.raises(DataError, match=f"record '{query.id}': {says}"):
            source.load(query)


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("chosen", None, "no column 'chosen': these are not the files of RLAIF-V"),
        ("image", pa.string(), "the column 'image' must hold {bytes, path}, found string"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, kind: Any, says: str) -> None:
    fields = {**{n: pa.string() for n in TEXTS}, "image": IMAGE, name: kind}
    schema = pa.schema([(n, k) for n, k in fields.items() if k is not None])
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        RlaifVSource(str(tmp_path)).queries()
    assert says in str(caught.value)


@pytest.mark.parametrize("bounds", [(0.0, 0.5, 1.0), (0.0, 0.2, 0.4, 1.0)])
def test_shares_are_disjoint_by_image_and_complete(
    write: Callable[..., str], bounds: tuple[float, ...]
) -> None:
    """Forty rows about twenty images, whose rows are not adjacent."""
    path = write(*({"image_path": f"{i % 20}.jpg"} for i in range(40)))
    parts = [
        {q.id for q in RlaifVSource(path, begin=begin, end=end).queries()} for begin, end in pairwise(bounds)
    ]
    assert set.union(*parts) == {q.id for q in RlaifVSource(path).queries()}
    images = [{int(i.removeprefix("rlaif-v-")) % 20 for i in ids} for ids in parts]
    assert sum(map(len, images)) == 20
    assert all(images)


@pytest.mark.parametrize("bounds", [(0.5, 0.5), (-0.1, 1), (0, 1.1)])
def test_shares_that_make_no_sense_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="0 <= begin < end <= 1"):
        RlaifVSource("x", begin=bounds[0], end=bounds[1])


def test_a_share_needs_the_names_of_images(write: Callable[..., str]) -> None:
    path = write(*({"image_path": f"{i}.jpg"} for i in range(9)), {})
    assert len(RlaifVSource(path).queries()) == 10
    with pytest.raises(DataError, match="row 9: no 'image_path'"):
        RlaifVSource(path, end=0.9).queries()
    with pytest.warns(UserWarning, match="row 9: no 'image_path'"):
        assert RlaifVSource(path, end=0.9, on_bad_record="skip").queries()


def test_a_preferred_response_that_states_a_confidence_is_refused(write: Callable[..., str]) -> None:
    path = write({}, {"chosen": "A dog. Confidence: 90%"}, {"chosen": "It looks confident."})
    with pytest.raises(DataError, match="row 1: record 'rlaif-v-1': .*states a confidence"):
        RlaifVSource(path).queries()
    with pytest.warns(UserWarning, match="left out 1 of 3 records"):
        assert len(RlaifVSource(path, on_bad_record="skip").queries()) == 2
