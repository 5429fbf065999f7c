"""Data sets of the library `datasets`: opening them, with errors that say what to do, and reading texts and images of their rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_calibration.data.sources.images import ImageFolder
from vlm_calibration.data.sources.tables import EmbeddedImages
from vlm_calibration.errors import did_you_mean
from vlm_calibration.files import first_line
from vlm_calibration.perturbation.images import load_image
from vlm_calibration.records import DataError, RecordError

if TYPE_CHECKING:
    from datasets import Dataset

SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files by which a folder is recognised that `save_to_disk` wrote."""
BATCH = 1000
"""Rows of texts that are read at once."""
IMAGE_BATCH = 16
"""Rows of images that are read at once."""


def open_dataset(
    path: str, name: str | None, split: str | None, revision: str | None
) -> tuple[Dataset, Path]:
    """Open one split of a data set, without reading its rows.

    Args:
        path: a folder written by `save_to_disk`, a Parquet file or a folder of them, or a name on the Hub.
        name: the configuration; None: the default one.
        split: the split; None: the only one.
        revision: branch, tag or commit on the Hub.

    Returns:
        The data set, and the folder that image paths in it may be relative to.

    Raises:
        DataError: the library is not installed, there is no such data set, configuration or split, or no network.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path}: reading it needs the package datasets, which is not installed ({error}): "
            "pip install 'vlm-calibration[datasets]'"
        ) from error
    local = Path(path)
    if any((local / file).is_file() for file in SAVED):
        if name is not None or revision is not None:
            raise DataError(
                f"{path}: a folder of save_to_disk has no configurations and revisions: leave out `name` and `revision`"
            )
        loaded = _attempt(path, lambda: datasets.load_from_disk(path))
        return _chosen_split(loaded, path, split), local
    if local.is_file():
        loaded = _attempt(path, lambda: datasets.load_dataset("parquet", data_files=path))
        return _chosen_split(loaded, path, split), local.parent
    if local.is_dir():
        if not any(local.rglob("*.parquet")):
            raise DataError(f"{path}: neither a folder of save_to_disk nor one with *.parquet files")
        loaded = _attempt(path, lambda: datasets.load_dataset(path, name))
        return _chosen_split(loaded, path, split), local
    if not _is_hub_name(path):
        raise DataError(f"{path}: no such file or folder, and no name of a data set on the Hub (OWNER/NAME)")
    loaded = _attempt(path, lambda: datasets.load_dataset(path, name, split=split, revision=revision))
    return _chosen_split(loaded, path, split), Path(datasets.config.HF_CACHE_HOME)


def _attempt(path: str, load: Any) -> Any:
    try:
        return load()
    # The library raises errors of any class, also those of the packages below it.
    except Exception as error:
        if isinstance(error, ConnectionError) or "offline" in str(error).lower():
            raise DataError(
                f"{path}: no such folder, and the Hub cannot be reached ({first_line(error)}): save the data set with "
                "save_to_disk where there is a network, and give its folder"
            ) from error
        also = "" if os.path.exists(path) else "no such folder, and as a name on the Hub it "
        raise DataError(f"{path}: {also}cannot be opened: {first_line(error)}") from error


def _chosen_split(loaded: Any, path: str, split: str | None) -> Dataset:
    """The split, or the only one."""
    if not isinstance(loaded, dict):
        own = None if loaded.split is None else str(loaded.split)
        if split is not None and own is not None and own.split("[")[0] != split.split("[")[0]:
            raise DataError(f"{path}: split: this is the split {own!r}, expected {split!r}")
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        names = [str(key) for key in loaded]
        similar = did_you_mean(split or "", names)
        problem = "needs one" if split is None else f"there is no {split!r}{similar}"
        raise DataError(f"{path}: split: {problem}; the data set has {', '.join(names)}")
    return loaded[split]


def _is_hub_name(path: str) -> bool:
    is_path = (
        os.path.isabs(path)
        or path.startswith(".")
        or path.endswith((".parquet", ".json", ".jsonl", ".arrow"))
    )
    return not is_path and path.count("/") == 1


class DatasetRows:
    """The rows of an open data set: text columns by field, and images.

    Args:
        dataset: the data set.
        columns: field -> name of its column.
        folder: the folder of images that are files.
    """

    def __init__(self, dataset: Dataset, columns: Mapping[str, str], folder: ImageFolder) -> None:
        self.folder = folder
        self._columns = {field: column for field, column in columns.items() if field != "image_id"}
        self._labels = {
            column: feature.names for column, feature in dataset.features.items() if hasattr(feature, "names")
        }
        self._image_ids = dataset.select_columns([columns["image_id"]]) if "image_id" in columns else None
        self._images = _undecoded(dataset.select_columns([columns["image"]]))
        self._are_files = _is_path(self._images.features[columns["image"]])
        if not self._are_files:
            del self._columns["image"]
        self._texts = dataset.select_columns(sorted(set(self._columns.values())))

    def texts(self) -> Iterator[dict[str, Any]]:
        """The fields of all rows; `image` is among them only if images are files."""
        for batch in self._texts.iter(BATCH):
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield self._fields(dict(zip(names, values, strict=True)))

    def text(self, row: int) -> dict[str, Any]:
        """The fields of a row."""
        return self._fields(self._texts[row])

    def _fields(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {field: self._value(column, record[column]) for field, column in self._columns.items()}

    def _value(self, column: str, value: Any) -> Any:
        names = self._labels.get(column)
        if names is None or not isinstance(value, int):
            return value
        return names[value] if 0 <= value < len(names) else None

    def image_keys(self) -> Iterator[bytes]:
        """What tells images apart, for each row."""
        keys, size = (self._images, IMAGE_BATCH) if self._image_ids is None else (self._image_ids, BATCH)
        [column] = keys.column_names
        for batch in keys.iter(size):
            for value in batch[column]:
                yield _image_key(value)

    @property
    def name(self) -> str:
        """The same for data sets of equal content and history."""
        return str(self._images._fingerprint)

    def file(self, name: str) -> Path | None:
        """The file of the image `name` of a query; None if it is embedded."""
        content = name if self._are_files else self._content(name)
        return self.folder.path(content) if isinstance(content, str) else None

    def read(self, name: str) -> bytes:
        """The encoded bytes of the image `name` of a query.

        Raises:
            RecordError: the row has no image.
        """
        content = self._content(name)
        if not isinstance(content, bytes):
            raise RecordError(f"{name} holds no image bytes")
        return content

    def load(self, name: str) -> np.ndarray:
        """Load the image `name` of a query, uint8 [H, W, 3].

        Raises:
            RecordError: the row has no image, or its path leaves the folder.
            ImageError: the image cannot be read.
        """
        file = self.file(name)
        return load_image(self.read(name), name=name) if file is None else load_image(file)

    def _content(self, name: str) -> bytes | str | None:
        """The bytes of an embedded image, or the path that stands in their place; None if there is neither."""
        [value] = self._images[EmbeddedImages.row(name)].values()
        return _bytes_or_path(single(value))


def _undecoded(dataset: Dataset) -> Dataset:
    """The data set with images as {bytes, path}."""
    from datasets import Image, List

    for column, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    return dataset


def _is_path(feature: Any) -> bool:
    """Whether a column holds texts, or lists of texts."""
    inner = getattr(feature, "feature", feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def single(value: Any) -> Any:
    """The only element of a list; any other value as it is."""
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise RecordError(
            f"expected one image, found {len(value)}; only questions about one image can be asked"
        )
    return value[0]


def _image_key(value: Any) -> bytes:
    """The digest of an embedded image, or the path of a file or the id of an image."""
    content = _bytes_or_path(value[0] if isinstance(value, list) and len(value) == 1 else value)
    return blake2b(content, digest_size=16).digest() if isinstance(content, bytes) else repr(content).encode()


def _bytes_or_path(image: Any) -> Any:
    """The content of an image object {bytes, path}; any other value as it is, and None for an empty one."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    return image or None
