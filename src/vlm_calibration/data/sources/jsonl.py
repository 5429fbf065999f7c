"""Queries from a JSONL file, images from a folder: the format for data of one's own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.perturbation.images import ImageError, load_image
from vlm_calibration.records import DataError, LoadedImage, Query, RecordError, query_from_dict
from vlm_calibration.regions.rle import region_to_mask

MAX_NAMED = 5


class JsonlSource(QuerySource):
    """One query as a JSON object on each line; blank lines are passed over.

    Args:
        path: the JSONL file.
        root: folder that image paths are relative to; by default the folder of `path`. No image may lie outside it.
        on_bad_record: "raise" stops at the first record that cannot be used; "skip" leaves such records out, and says
            how many and why.
    """

    def __init__(
        self, path: str, root: str | None = None, on_bad_record: Literal["raise", "skip"] = "raise"
    ) -> None:
        self.path = Path(path)
        self.root = Path(root) if root is not None else self.path.parent
        self.on_bad_record = on_bad_record
        self._queries: list[Query] | None = None

    def queries(self) -> Sequence[Query]:
        if self._queries is None:
            self._queries = self._read()
        return self._queries

    def _read(self) -> list[Query]:
        seen: dict[str, int] = {}
        queries: list[Query] = []
        bad: list[str] = []
        try:
            lines = self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.path}: cannot read the queries: {error.strerror}") from error
        with lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    query = self._parse(line)
                    if query.id in seen:
                        raise RecordError(f"duplicate id {query.id!r}, first seen on line {seen[query.id]}")
                except RecordError as error:
                    message = f"{self.path}:{number}: {error}"
                    if self.on_bad_record == "raise":
                        raise DataError(message) from error
                    bad.append(message)
                    continue
                seen[query.id] = number
                queries.append(query)
        if bad:
            shown = "; ".join(bad[:MAX_NAMED])
            rank_zero_warn(f"left out {len(bad)} of {len(bad) + len(queries)} records: {shown}")
        if not queries:
            raise DataError(f"{self.path}: no usable query in this file")
        return queries

    def _parse(self, line: bytes) -> Query:
        try:
            data = json.loads(line)
        except UnicodeDecodeError as error:
            raise RecordError(f"not UTF-8: {error}") from error
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not JSON: {error}") from error
        query = query_from_dict(data)
        image = self._image_path(query)
        # Unlike Path.is_file, this takes any name, too long ones included.
        if not os.path.isfile(image):
            raise RecordError(f"record {query.id!r}: no such image: {image}")
        return query

    def _image_path(self, query: Query) -> Path:
        # Symbolic links count too: what is opened must really lie below the root.
        root = os.path.realpath(self.root)
        resolved = os.path.realpath(os.path.join(root, query.image))
        if os.path.commonpath([root, resolved]) != root:
            raise RecordError(
                f"record {query.id!r}: the image path {query.image!r} leaves the data root {self.root}"
            )
        return Path(resolved)

    def load(self, query: Query) -> LoadedImage:
        try:
            image = load_image(self._image_path(query))
            height, width = image.shape[:2]
            masks = [(r.label, region_to_mask(r, height, width)) for r in query.regions]
        except (RecordError, ImageError) as error:
            raise DataError(f"{self.path}: record {query.id!r}: {error}") from error
        return LoadedImage(
            image,
            tuple(m for label, m in masks if query.is_evidence(label)),
            tuple(m for label, m in masks if not query.is_evidence(label)),
        )
