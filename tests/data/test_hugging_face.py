"""Data sets of the library `datasets`: the columns people have, images in every form, and errors that name the column."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_calibration.data.sources.hugging_face import HuggingFaceSource
from vlm_calibration.records import DataError

datasets = pytest.importorskip("datasets")
EMBEDDED = datasets.Image()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes to the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(shade: int, size: tuple[int, int] = (6, 4), mode: str = "RGB", **options: Any) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new(mode, size, (shade, 0, 0) if mode == "RGB" else shade).save(file, "PNG", **options)
    return {"bytes": file.getvalue(), "path": None}


def rows(n: int = 3, **changes: list[Any]) -> dict[str, list[Any]]:
    plain = {
        "question": [f"What is in picture {i}?" for i in range(n)],
        "answer": ["a dog", "Yes", "It is a very long answer."][:n],
        "image": [png(i) for i in range(n)],
    }
    return {**plain, **changes}


def dataset(columns: dict[str, list[Any]], **features: Any) -> Any:
    plain = datasets.Dataset.from_dict(
        {k: v for k, v in columns.items() if k not in features and k != "image"}
    )
    for name in [k for k in columns if k in features or k == "image"]:
        plain = plain.add_column(name, columns[name], feature=features.get(name, EMBEDDED))
    return plain


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    def saved(columns: dict[str, list[Any]], **features: Any) -> str:
        dataset(columns, **features).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")

    return saved


def test_rows_of_a_saved_folder(save: Callable[..., str]) -> None:
    source = HuggingFaceSource(save(rows()))
    queries = list(source.queries())
    assert [q.id for q in queries] == ["row-0", "row-1", "row-2"]
    assert [q.answer_type for q in queries] == ["short", "yes_no", "open"]
    assert queries[1].question == "What is in picture 1?"
    copy = pickle.loads(pickle.dumps(source))
    for i in (2, 0, 1):
        for any_source in (source, copy):
            image = any_source.load(queries[i]).image
            assert image.shape == (4, 6, 3)
            assert image[0, 0].tolist() == [i, 0, 0]
    assert list(copy.queries()) == queries


def test_a_folder_of_parquet_files_and_one_file(tmp_path: Path) -> None:
    data = dataset(rows())
    for name, part in (("train", [0, 1]), ("validation", [2])):
        data.select(part).to_parquet(tmp_path / f"files/{name}-00000-of-00001.parquet")
    folder = str(tmp_path / "files")
    assert [q.answer for q in HuggingFaceSource(folder, split="validation").queries()] == [
        "It is a very long answer."
    ]
    with pytest.raises(DataError, match=f"{folder}: split: .*train, validation"):
        HuggingFaceSource(folder).queries()
    one = HuggingFaceSource(f"{folder}/train-00000-of-00001.parquet")
    assert [q.answer for q in one.queries()] == ["a dog", "Yes"]
    assert one.load(one.queries()[1]).image.shape == (4, 6, 3)


def test_splits_of_a_saved_folder(tmp_path: Path) -> None:
    path = str(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset(rows(2)), "test": dataset(rows(1))}).save_to_disk(path)
    assert len(HuggingFaceSource(path, split="test").queries()) == 1
    with pytest.raises(DataError, match="split: there is no 'tset'.*did you mean test"):
        HuggingFaceSource(path, split="tset").queries()
    with pytest.raises(DataError, match="configurations"):
        HuggingFaceSource(path, name="x").queries()


def test_columns_of_other_names_and_kinds(save: Callable[..., str]) -> None:
    labels = datasets.ClassLabel(names=["a cat", "a dog"])
    region = {"label": "dog", "box": [0.0, 0.0, 3.0, 4.0]}
    path = save(
        {
            "q": ["Which?\nAnswer the question using a single word or phrase.", "What?"],
            "label": [1, 0],
            "image": [png(1), png(2)],
            "number": [7, 8],
            "kind": ["short", "open"],
            "key": [["dog"], []],
            "found": [[region], []],
            "group": [3, None],
            "synonyms": [["dog"], []],
        },
        label=labels,
    )
    names = {"question": "q", "answer": "label", "id": "number", "answer_type": "kind", "objects": "key"}
    source = HuggingFaceSource(path, columns={**names, "regions": "found", "category": "group"})
    first, second = source.queries()
    assert (first.id, first.question, first.answer, first.answer_type) == ("7", "Which?", "a dog", "short")
    assert (first.objects, first.synonyms, first.category) == (("dog",), ("dog",), "3")
    assert (second.answer, second.answer_type, second.category, second.regions) == ("a cat", "open", None, ())
    [mask] = source.load(first).evidence
    assert np.argwhere(mask).max(0).tolist() == [3, 2]


def test_answers_that_are_no_text(save: Callable[..., str]) -> None:
    """A column for each form."""
    many = [["cat"] * 4 + ["dog"] * 5 + ["cow"], ["dog"] * 10]
    forms: list[tuple[list[Any], list[tuple[str, str, tuple[str, ...]]]]] = [
        ([True, False], [("Yes", "yes_no", ()), ("No", "yes_no", ())]),
        ([2, 3], [("2", "short", ()), ("3", "short", ())]),
        ([2.0, 2.5], [("2", "short", ()), ("2.5", "short", ())]),
        ([["dog", "puppy"], ["cat"]], [("dog", "short", ("puppy",)), ("cat", "short", ())]),
        (many, [("dog", "short", ("cat",)), ("dog", "short", ())]),
    ]
    path = save(rows(2, **{f"form {i}": answers for i, (answers, _) in enumerate(forms)}))
    for i, (_, expected) in enumerate(forms):
        queries = HuggingFaceSource(path, columns={"answer": f"form {i}"}).queries()
        assert [(q.answer, q.answer_type, q.synonyms) for q in queries] == expected


FORMS: dict[str, tuple[list[Any], Any]] = {
    "embedded": ([png(5), png(6)], EMBEDDED),
    "a list of one": ([[png(5)], [png(6)]], datasets.List(EMBEDDED)),
    "bytes": ([png(5)["bytes"], png(6)["bytes"]], datasets.Value("binary")),
    "an object": (
        [png(5), png(6)],
        {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    ),
    "paths": (["5.png", "6.png"], datasets.Value("string")),
    "lists of paths": ([["5.png"], ["6.png"]], datasets.List(datasets.Value("string"))),
    "objects of paths": (
        [{"bytes": None, "path": f"{i}.png"} for i in (5, 6)],
        {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    ),
}


def test_every_form_of_image(save: Callable[..., str], tmp_path: Path) -> None:
    """A column for each form."""
    contents = [png(i)["bytes"] for i in (5, 6)]
    for i, content in zip((5, 6), contents, strict=True):
        (tmp_path / f"{i}.png").write_bytes(content)
    values = {form: images for form, (images, _) in FORMS.items()}
    path = save(rows(2, **values), **{form: feature for form, (_, feature) in FORMS.items()})
    for form in FORMS:
        source = HuggingFaceSource(path, root=str(tmp_path), columns={"image": form})
        queries = source.queries()
        assert [source.load(q).image[0, 0, 0] for q in queries] == [5, 6], form
        found = [source.image_content(q) for q in queries]
        assert [c if isinstance(c, bytes) else c.read_bytes() for c in found] == contents
        assert len({source.image_id(q) for q in queries}) == 2
        assert (source.image_file(queries[0]) is None) == ("path" not in form)


def test_images_are_decoded_by_our_decoder(save: Callable[..., str]) -> None:
    """Upright by EXIF, three channels of a grey image, and no image that is too large."""
    exif = Image.Exif()
    exif[274] = 6
    source = HuggingFaceSource(save(rows(2, image=[png(9, mode="L"), png(9, exif=exif)])))
    grey, rotated = (source.load(q).image for q in source.queries())
    assert grey.shape == (4, 6, 3)
    assert rotated.shape == (6, 4, 3)


def test_images_that_cannot_be_loaded_are_named(save: Callable[..., str]) -> None:
    path = save(rows(2, image=[{"bytes": b"no", "path": None}, None]))
    source = HuggingFaceSource(path)
    for query in source.queries():
        with pytest.raises(DataError, match=f"{path}: record '{query.id}': {query.image}"):
            source.load(query)


def test_files_that_are_missing_or_outside_are_refused(save: Callable[..., str]) -> None:
    images = {"a": "none.png", "b": "../x.png", "c": "/etc/passwd"}
    text = datasets.Value("string")
    path = save(rows(1, **{k: [v] for k, v in images.items()}), **dict.fromkeys(images, text))
    for column, image in images.items():
        with pytest.raises(DataError, match=f"{path}: row 0: .*{image}"):
            HuggingFaceSource(path, columns={"image": column}).queries()


BAD: dict[str, tuple[str, list[Any], str]] = {
    "an empty question": ("question", ["a", " "], "'question'"),
    "no answer": ("answer", ["a", None], "'answer'"),
    "an empty list of answers": ("answer", [["a"], []], "list of answers"),
    "a stated confidence": ("answer", ["a", "b. Confidence: 30%"], "confidence"),
    "an unknown answer type": ("answer_type", ["short", "text"], "'text'"),
    "a repeated id": ("id", ["x", "x"], "duplicate id 'x'"),
    "a bad region": (
        "regions",
        [[{"label": "a", "box": [0, 0, 4, 4]}], [{"label": "a", "box": [0, 0, 1]}]],
        "'box'",
    ),
}
"""Name of a column -> the field that it holds, its values, of which the second is bad, and what the error names."""


def test_bad_rows_are_named_or_left_out(save: Callable[..., str]) -> None:
    path = save(rows(2, **{name: values for name, (_, values, _) in BAD.items()}))
    for name, (field, _, culprit) in BAD.items():
        with pytest.raises(DataError) as caught:
            HuggingFaceSource(path, columns={field: name}).queries()
        assert str(caught.value).startswith(f"{path}: row 1: "), name
        assert culprit in str(caught.value)
        source = HuggingFaceSource(path, columns={field: name}, on_bad_record="skip")
        with pytest.warns(UserWarning, match="left out 1 of 2 records"):
            assert len(source.queries()) == 1


def test_columns_that_are_missing_are_named(save: Callable[..., str]) -> None:
    path = save(rows())
    for columns, culprit in (
        ({"question": "qestion"}, "columns.question: no column 'qestion'.*question"),
        ({"objects": "things"}, "columns.objects: no column 'things'"),
    ):
        with pytest.raises(DataError, match=culprit):
            HuggingFaceSource(path, columns=columns).queries()
    with pytest.raises(DataError, match="columns: unknown field 'anser'.*answer"):
        HuggingFaceSource(path, columns={"anser": "a"})
    other = save({"text": ["a"], "image": [png(1)]})
    with pytest.raises(DataError, match="no column 'question': name it with columns.question; there are"):
        HuggingFaceSource(other).queries()


def test_shares_have_no_image_in_common(save: Callable[..., str], tmp_path: Path) -> None:
    """An image is known by its bytes, by an id, or by its path."""
    n = 30
    columns = {
        "question": ["What?"] * n,
        "answer": ["a dog"] * n,
        "image": [png(i // 3) for i in range(n)],
        "file": [f"{i // 3}.png" for i in range(n)],
        "number": [i // 3 for i in range(n)],
    }
    for i in range(n // 3):
        (tmp_path / f"{i}.png").write_bytes(png(i)["bytes"])
    path = save(columns, file=datasets.Value("string"))
    for names in (None, {"image_id": "number"}, {"image": "file"}):
        parts = []
        for begin, end in ((0, 0.5), (0.5, 1)):
            source = HuggingFaceSource(path, columns=names, root=str(tmp_path), begin=begin, end=end)
            parts.append([int(source.load(q).image[0, 0, 0]) for q in source.queries()])
        assert len(parts[0]) + len(parts[1]) == n
        assert not set(parts[0]) & set(parts[1])


def test_what_is_no_data_set_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"no")
    for path in ("empty", "none", "bad.parquet", "none.parquet"):
        with pytest.raises(DataError, match=str(tmp_path / path)):
            HuggingFaceSource(str(tmp_path / path)).queries()


@pytest.mark.parametrize(
    "error",
    [ConnectionError("Couldn't reach the Hub"), ValueError("x\ny"), OSError("offline mode is enabled")],
)
def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match="someone/something: no such folder") as caught:
        HuggingFaceSource("someone/something").queries()
    assert "\n" not in str(caught.value)
    assert ("save_to_disk" in str(caught.value)) == (not isinstance(error, ValueError))


def test_a_name_on_the_hub_gets_configuration_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def loads(*args: Any, **settings: Any) -> Any:
        calls.append((args, settings))
        return dataset(rows())

    monkeypatch.setattr(datasets, "load_dataset", loads)
    assert len(HuggingFaceSource("someone/something", "config", "train[:3]", "v1").queries()) == 3
    assert calls == [(("someone/something", "config"), {"split": "train[:3]", "revision": "v1"})]


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is an extra: building a source needs it as little as the rest."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    source = HuggingFaceSource("x")
    with pytest.raises(DataError, match=r"pip install 'vlm-calibration\[datasets\]'"):
        source.queries()
