"""Data sets of the library `datasets`, with any names of columns: a saved folder, Parquet files, or a name on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vlm_calibration.data.convert.reading import (
    AnswerTypeChoice,
    Source,
    combine_answers,
    infer_answer_type,
    strip_format_request,
)
from vlm_calibration.errors import did_you_mean
from vlm_calibration.files import first_line
from vlm_calibration.hub import is_hub_name
from vlm_calibration.records import DataError, RecordError, id_text

REQUIRED = ("question", "answer", "image")
OPTIONAL = ("id", "answer_type", "objects", "regions", "category", "synonyms", "absent", "wrong_answers")


def hf(
    path: str,
    *,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    answer_type: AnswerTypeChoice = "infer",
) -> Source:
    """Convert a data set of the library `datasets`, one query a row (pip install 'vlm-calibration[datasets]').

    An answer may be a text, a number, true or false, a class label, or a list: variants, of which the first is the gold answer, or
    those of ten annotators. An image is embedded or the name of a file, and may stand in a list of one.

    Args:
        path: a folder of `save_to_disk`, a Parquet file or a folder of them, or a name on the Hub, OWNER/NAME
        name: the configuration on the Hub, where there are several
        split: e.g. train; needed where there are several
        revision: branch, tag or commit on the Hub
        columns: key of a query -> its column, where it has another name, e.g. '{answer: label, id: question_id}'
        answer_type: of all answers, where there is no column of it; "infer" tells it from the form of each
    """
    keys = REQUIRED + OPTIONAL
    columns = columns or {}
    for key in columns:
        if key not in keys:
            advice = f"{did_you_mean(key, keys)}; there are {', '.join(keys)}"
            raise DataError(f"--columns: no key {key!r}{advice}")
    dataset = _open(path, name, split, revision)
    from datasets import Image, List

    there = list(dataset.features)
    names = {key: columns.get(key, key) for key in keys}
    for key in (*columns, *REQUIRED):
        if (column := names[key]) not in there:
            advice = f"{did_you_mean(column, there)}; there are {', '.join(there)}"
            raise DataError(f"{path}: --columns: no column {column!r} for {key!r}{advice}")
    names = {key: column for key, column in names.items() if column in there}
    dataset = dataset.select_columns(sorted(set(names.values())))
    for column, feature in dataset.features.items():
        # Images stay {bytes, path}: they are written as they are.
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    labels = {column: f.names for column, f in dataset.features.items() if hasattr(f, "names")}
    for row, values in enumerate(dataset):
        for column, of_column in labels.items():
            if isinstance(number := values[column], int):
                values[column] = of_column[number] if number >= 0 else None
        record = {key: values[column] for key, column in names.items()}
        yield f"{path}: row {row}", partial(_query, row, record, answer_type)


def _query(row: int, record: dict[str, Any], answer_type: AnswerTypeChoice) -> list[dict[str, Any]]:
    answer, synonyms = record["answer"], list(record.get("synonyms") or [])
    if isinstance(answer, list):
        answer, others = combine_answers(answer)
        synonyms += others
    answer = _as_text(answer)
    kind = record.get("answer_type") or answer_type
    image, wrong = record["image"], record.get("wrong_answers")
    if isinstance(image, list):
        if len(image) != 1:
            raise RecordError(f"expected one image, found {len(image)}")
        image = image[0]
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if "wrong_answers" in record:
        given = wrong if isinstance(wrong, list) else [wrong]
        wrong = [text for text in given if text and text.strip() and text != answer]
    query = {
        "id": id_text(record.get("id", f"row-{row}")),
        "image": image,
        "question": strip_format_request(record["question"] or ""),
        "answer": answer,
        "answer_type": infer_answer_type(answer or "") if kind == "infer" else kind,
        "category": _as_text(record.get("category")) or None,
        "synonyms": synonyms,
        "wrong_answers": wrong,
    }
    return [record | query]


def _as_text(value: Any) -> Any:
    """A number, true or false as text; any other value as it is."""
    if isinstance(value, bool):
        return "Yes" if value else "No"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else value


def _open(path: str, name: str | None, split: str | None, revision: str | None) -> Any:
    """One split of a data set."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path}: {error}: pip install 'vlm-calibration[datasets]'") from error
    local = Path(path)
    if not local.exists() and not is_hub_name(path):
        raise DataError(f"{path}: no such file or folder, and no name of a data set on the Hub (OWNER/NAME)")
    if local.exists() and (name or revision):
        raise DataError(f"{path}: --name and --revision are for a data set on the Hub")
    try:
        if any((local / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(path)
        elif local.exists():
            # Streaming reads the files as they are, where loading would first copy them into the library's cache.
            files = {"data_files": path} if local.is_file() else {"data_dir": path}
            loaded = datasets.load_dataset("parquet", **files, streaming=True)
        else:
            loaded = datasets.load_dataset(path, name, split=split, revision=revision)
    # The library raises errors of any class, also those of the packages below it.
    except Exception as error:
        advice = "without a network, use a folder of save_to_disk"
        raise DataError(f"{path}: cannot be opened: {first_line(error)}; {advice}") from error
    if not isinstance(loaded, dict):
        # A split of the Hub may be a part, such as "train[:10]".
        loaded = {str(loaded.split or split) if local.exists() else split: loaded}
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        expected = f"{', '.join(map(str, loaded))}{did_you_mean(split or '', loaded)}"
        raise DataError(f"{path}: --split: expected one of {expected}, found {split!r}")
    return loaded[split]


def rlaif_v(path: str = "openbmb/RLAIF-V-Dataset") -> Source:
    """Convert RLAIF-V (Yu et al., arXiv 2405.17220; not for commercial use; pip install 'vlm-calibration[datasets]').

    The preferred response is the gold answer, the rejected one a wrong answer. Other data sets of pairs: `data convert hf` with
    --columns '{answer: CHOSEN, wrong_answers: REJECTED}' --answer-type open.

    Args:
        path: the folder of its Parquet files, or its name on the Hub
    """
    columns = {"answer": "chosen", "wrong_answers": "rejected", "category": "origin_dataset"}
    return hf(path, split="train", columns=columns, answer_type="open")
