"""Checks converted queries, and writes the usable ones as JSON lines."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from vlm_calibration.data.convert.reading import Output, Queries, explained
from vlm_calibration.data.sources.base import ImageFolder
from vlm_calibration.data.sources.jsonl import RecordChecks
from vlm_calibration.files import replacing
from vlm_calibration.records import DataError, RecordError, query_from_dict

_DETAILS = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\d+")
"""What differs between messages about the same mistake."""


class QueryWriter:
    """Writes the usable queries of a published format, all or none; an output that may not be written is a DataError.

    Attributes:
        root: the folder that image paths in the file are relative to: its own, or that of the images if they are not below it.
        queries: number of queries written, `regions` of those with regions, and `answer_types` of each type.
        image_names: the images that they are about.
        skipped: kind of mistake -> how many records were left out, and the message about the first.
    """

    def __init__(self, output: Output) -> None:
        out = output.out
        if out.suffix != ".jsonl":
            raise DataError(f"--out {out}: expected a name that ends in .jsonl")
        self.output = output
        self._refuse(out)
        self._images = output.images or out.parent
        is_below = self._images.resolve().is_relative_to(out.parent.resolve())
        self.root = out.parent if is_below else self._images
        self.queries = self.regions = 0
        self.image_names: set[str] = set()
        self.answer_types: Counter[str] = Counter()
        self.skipped: dict[str, tuple[int, str]] = {}
        self._checks = RecordChecks(ImageFolder(self.root), "in query")
        self._folder = out.with_name(f"{out.stem}_images")

    def write(self, source: Iterable[tuple[str, Queries]]) -> None:
        """Check and write all queries; a bad record, if none may be left out, or no usable one is a DataError."""
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.output.out))
            file = stack.enter_context(temporary.open("w", encoding="utf-8", newline="\n"))
            folder = None
            for where, queries in source:
                records: list[dict[str, Any]] = []
                with self._bad_left_out(where):
                    records = queries()
                for record in records:
                    if isinstance(record["image"], bytes) and folder is None:
                        self._refuse(self._folder)
                        # Leaving the stack renames the folder before the file that names its images.
                        folder = stack.enter_context(replacing(self._folder, sync=False))
                        folder.mkdir()
                    with self._bad_left_out(where):
                        self._add(record, file, folder)
            if not self.queries:
                first = next(iter(self.skipped.values()), (0, "the files have no record"))[1]
                raise DataError(f"no usable query: {first}")

    @contextmanager
    def _bad_left_out(self, where: str) -> Iterator[None]:
        """Count what is wrong with the record at this place, or stop at it."""
        try:
            with explained(where):
                yield
        except DataError as error:
            if not self.output.skip_bad:
                raise DataError(f"{error}; --skip-bad leaves such records out") from error
            kind = _DETAILS.sub("_", str(error).removeprefix(where))
            count, first = self.skipped.get(kind, (0, str(error)))
            self.skipped[kind] = count + 1, first

    def _add(self, record: dict[str, Any], file: TextIO, folder: Path | None) -> None:
        """Write one query, and its image to the folder if it is embedded."""
        content = record["image"]
        if is_embedded := isinstance(content, bytes):
            record["image"] = f"{self._folder.name}/{_image_name(content)}"
        elif isinstance(content, str) and content:
            record["image"] = os.path.relpath(self._images / content, self.root)
        query = query_from_dict(record)
        self._checks.check(query, self.queries, has_file=not is_embedded)
        if is_embedded and folder is not None and query.image not in self.image_names:
            path = folder / Path(query.image).relative_to(self._folder.name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        self.image_names.add(query.image)
        self.queries += 1
        self.answer_types[query.answer_type] += 1
        self.regions += bool(query.regions)
        record["id"] = query.id
        # An empty list of wrong answers says that there is none.
        row = {k: v for k, v in record.items() if v or (k == "wrong_answers" and v is not None)}
        file.write(json.dumps({"id": query.id} | row, ensure_ascii=False) + "\n")

    def _refuse(self, path: Path) -> None:
        if path.exists() and not self.output.overwrite:
            raise DataError(f"{path}: exists already: --overwrite replaces it")


def _image_name(content: bytes) -> str:
    """The path of an embedded image, by a digest of its content: "0f/0f3a....jpeg"."""
    try:
        with Image.open(BytesIO(content)) as image:
            kind = str(image.format).lower()
    # Pillow raises any exception on damaged bytes.
    except Exception as error:
        raise RecordError(f"'image' is no image that Pillow reads: {error}") from error
    digest = blake2b(content, digest_size=16).hexdigest()
    return f"{digest[:2]}/{digest}.{kind}"
