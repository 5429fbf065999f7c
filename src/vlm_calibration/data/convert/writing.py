"""Checks converted queries and writes them as JSON lines: the one place that decides which records of a published format are usable."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any, TextIO, TypeVar

from PIL import Image

from vlm_calibration.data.convert.reading import Queries, explained
from vlm_calibration.data.sources.images import ImageFolder
from vlm_calibration.data.sources.query_file import RecordChecks
from vlm_calibration.files import replacing
from vlm_calibration.records import DataError, RecordError, query_from_dict

T = TypeVar("T")

_DETAILS = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\d+")
"""What differs between messages about the same mistake."""


class QueryWriter:
    """Writes the usable queries of a published format, all or none.

    Images that a record embeds go to the folder OUT_images, each once, named by a digest of their content.

    Args:
        out: the file to write; another suffix than .jsonl, or a file that may not be overwritten, is a DataError.
        images: folder that names of image files are relative to; None: that of `out`.
        skip_bad: count and leave out bad records; otherwise the first one is an error.
        overwrite: replace an existing file, and an existing folder of embedded images.

    Attributes:
        root: the folder that image paths in `out` are relative to: that of `out`, or `images` if it is not below that.
        queries: number of queries written, `regions` of those with regions, and `answer_types` of each type.
        image_names: the images that they are about.
        skipped: kind of mistake -> how many records were left out, and the message about the first.
    """

    def __init__(
        self, out: Path, images: Path | None = None, *, skip_bad: bool = False, overwrite: bool = False
    ) -> None:
        if out.suffix != ".jsonl":
            raise DataError(f"--out {out}: expected a name that ends in .jsonl")
        self.out, self.skip_bad, self.overwrite = out, skip_bad, overwrite
        self._refuse(out)
        self._images = images or out.parent
        self.root = out.parent
        if not self._images.resolve().is_relative_to(out.parent.resolve()):
            self.root = self._images
        self.queries = self.regions = 0
        self.image_names: set[str] = set()
        self.answer_types: Counter[str] = Counter()
        self.skipped: dict[str, tuple[int, str]] = {}
        self._checks = RecordChecks(ImageFolder(self.root), "in query")
        self._folder = out.with_name(f"{out.stem}_images")
        self._unfinished: Path | None = None

    def write(self, source: Iterable[tuple[str, Queries]]) -> None:
        """Check and write all queries; a bad record, if none may be left out, or no usable one is a DataError."""
        with ExitStack() as stack:
            file = stack.enter_context(
                stack.enter_context(replacing(self.out)).open("w", encoding="utf-8", newline="\n")
            )
            for where, queries in source:
                for record in self._attempt(where, queries) or ():
                    if isinstance(record["image"], bytes) and self._unfinished is None:
                        self._refuse(self._folder)
                        # Leaving the stack renames the folder before the file that names its images.
                        self._unfinished = stack.enter_context(replacing(self._folder, sync=False))
                        self._unfinished.mkdir()
                    self._attempt(where, partial(self._add, record, file))
            if not self.queries:
                first = next(iter(self.skipped.values()), (0, "the files have no record"))[1]
                raise DataError(f"no usable query: {first}")

    def _attempt(self, where: str, action: Callable[[], T]) -> T | None:
        """Do something with a record; if it is bad, count it and return None, or stop."""
        try:
            with explained(where):
                return action()
        except DataError as error:
            if not self.skip_bad:
                raise DataError(f"{error}; --skip-bad leaves such records out") from error
            kind = _DETAILS.sub("_", str(error).removeprefix(where))
            count, first = self.skipped.get(kind, (0, str(error)))
            self.skipped[kind] = count + 1, first
            return None

    def _add(self, record: dict[str, Any], file: TextIO) -> None:
        content = record["image"]
        embedded = content if isinstance(content, bytes) else None
        if embedded is not None:
            record["image"] = self._name(embedded)
        elif isinstance(content, str) and content:
            record["image"] = os.path.relpath(self._images / content, self.root)
        query = query_from_dict(record)
        self._checks.check(query, self.queries, has_file=embedded is None)
        if embedded is not None and query.image not in self.image_names:
            assert self._unfinished is not None
            path = self._unfinished / Path(query.image).relative_to(self._folder.name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(embedded)
        self.image_names.add(query.image)
        self.queries += 1
        self.answer_types[query.answer_type] += 1
        self.regions += bool(query.regions)
        row = {"id": query.id}
        row |= {
            k: v for k, v in record.items() if k != "id" and (v or (k == "wrong_answers" and v is not None))
        }
        file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _name(self, content: bytes) -> str:
        """The path of an embedded image, relative to the folder of `out`."""
        try:
            with Image.open(BytesIO(content)) as image:
                kind = str(image.format).lower()
        # Pillow raises any exception on damaged bytes.
        except Exception as error:
            raise RecordError(f"'image' is no image that Pillow reads: {error}") from error
        digest = blake2b(content, digest_size=16).hexdigest()
        return f"{self._folder.name}/{digest[:2]}/{digest}.{kind}"

    def _refuse(self, path: Path) -> None:
        if path.exists() and not self.overwrite:
            raise DataError(f"{path}: exists already: --overwrite replaces it")
