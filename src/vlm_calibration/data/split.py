"""Splits one file of queries into train, validation, calibration and test, by the content of images and a seed alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.model_selection import GroupShuffleSplit

from vlm_calibration.data.near_duplicates import group_images, hash_images
from vlm_calibration.data.sources.base import BadRecords, OnBadRecord
from vlm_calibration.data.sources.jsonl import PRESETS, SPLITS, JsonlSource
from vlm_calibration.data.sources.parquet import ParquetSource
from vlm_calibration.files import json_lines, replacing
from vlm_calibration.records import DataError
from vlm_calibration.text.grading import parse_answer


def open_source(path: Path, root: Path, on_bad_record: OnBadRecord) -> JsonlSource:
    """The source of a .jsonl or .parquet file; any other is a DataError."""
    if path.is_dir() or path.suffix not in PRESETS:
        raise DataError(f"{path}: expected a file of queries that ends in {' or '.join(PRESETS)}")
    kind = ParquetSource if path.suffix == ".parquet" else JsonlSource
    return kind(str(path), str(root), on_bad_record=on_bad_record)


def output_paths(path: Path, out: Path, overwrite: bool) -> dict[str, Path]:
    """The files to write, by the name of their split; a DataError if one may not be overwritten, or is the file to split."""
    paths = {name: out / f"{name}{path.suffix}" for name in SPLITS}
    for file in paths.values():
        if file.exists() and path.exists() and file.samefile(path):
            raise DataError(f"{path}: is the file to split: rename it, or write elsewhere with --out")
        if file.exists() and not overwrite:
            raise DataError(f"{file}: exists already: --overwrite replaces it, or write elsewhere with --out")
    return paths


def assign_queries(groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """The split of each query, as an index of `shares`, int64 [N]; -1 for a query without a group.

    Each split gets its share of the groups, int64 [N], rounded, and at least one; fewer groups than splits are a DataError.
    """
    splits = np.full(len(groups), -1)
    rest = np.flatnonzero(groups >= 0)
    if (total := len(np.unique(groups[rest]))) < len(shares):
        raise DataError(f"{total} different images are too few for {len(shares)} splits without a shared one")
    left = total
    for split in range(len(shares) - 1, 0, -1):
        number = min(max(1, round(shares[split] * total)), left - split)
        splitter = GroupShuffleSplit(1, test_size=number, train_size=left - number, random_state=seed)
        _, chosen = next(splitter.split(rest, groups=groups[rest]))
        splits[rest[chosen]] = split
        rest, left = np.delete(rest, chosen), left - number
    splits[rest] = 0
    return splits


def split_queries(
    source: JsonlSource, paths: Mapping[str, Path], shares: Sequence[float], seed: int, near: bool
) -> tuple[list[tuple[Path, int, int, float | None]], list[str], list[str]]:
    """Assign the groups of equal, or with `near` nearly equal images to `paths` (split -> file), and write all files, or none.

    Returns for each split the path, the numbers of queries and of images, and the share of yes among the yes/no answers; a message for
    each record left out; and the images of the largest group of nearly equal ones. A DataError if there are too few images, an image
    cannot be read, or a file cannot be written.
    """
    queries = source.queries()
    index: dict[str, int] = {}
    image_of_query = np.array([index.setdefault(source.image_id(query), len(index)) for query in queries])
    first = [queries[i] for i in np.unique(image_of_query, return_index=True)[1].tolist()]
    bad = BadRecords(source.on_bad_record)
    hashes = hash_images([(source, query) for query in first])
    for image, (query, hashed) in enumerate(zip(first, hashes, strict=True)):
        if isinstance(hashed, str):
            others = int((image_of_query == image).sum()) - 1
            also = f" and {others} more" if others else ""
            bad.add(f"{source.path}: record {query.id!r}{also}: {query.image}: {hashed}")
    groups = group_images(hashes, near)
    splits = assign_queries(groups[image_of_query], shares, seed)
    with ExitStack() as stack:
        temporary = [stack.enter_context(replacing(path)) for path in paths.values()]
        write = _write_rows if isinstance(source, ParquetSource) else _write_lines
        write(source, splits, temporary)
        for written in temporary:  # a full disk is noticed before any old file goes
            with written.open("rb") as file:
                os.fsync(file.fileno())
        for path in paths.values():
            # Should this process be killed between two renames, a file is missing; otherwise old and new would mix.
            path.unlink(missing_ok=True)
    files = []
    for split, path in enumerate(paths.values()):
        members = np.flatnonzero(splits == split)
        asked = map(queries.__getitem__, members.tolist())
        yes = [parse_answer(q.answer, "yes_no") == "yes" for q in asked if q.answer_type == "yes_no"]
        images = len(np.unique(image_of_query[members]))
        files.append((path, len(members), images, float(np.mean(yes)) if yes else None))
    [(label, _)] = Counter(groups[groups >= 0].tolist()).most_common(1)
    largest = [first[i].image for i in np.flatnonzero(groups == label)]
    return files, [*source.bad.messages, *bad.messages], largest


def _write_lines(source: JsonlSource, splits: np.ndarray, paths: Sequence[Path]) -> None:
    """Copy lines unchanged but for a byte order mark and a missing last line end."""
    split_of_line = dict(zip(source.numbers, splits.tolist(), strict=True))
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for line in json_lines(source.path):
            if (split := split_of_line.get(line.number, -1)) >= 0:
                files[split].write(line.content if line.content.endswith(b"\n") else line.content + b"\n")


def _write_rows(source: JsonlSource, splits: np.ndarray, paths: Sequence[Path]) -> None:
    """Copy rows with the schema and metadata of the file, one row group of it in memory at a time."""
    file = pq.ParquetFile(source.path)
    split_of_row = np.full(file.metadata.num_rows, -1)
    split_of_row[source.numbers] = splits
    with ExitStack() as stack:
        writers = [stack.enter_context(pq.ParquetWriter(path, file.schema_arrow)) for path in paths]
        begin = 0
        for number in range(file.num_row_groups):
            group = file.read_row_group(number)
            part, begin = split_of_row[begin : begin + len(group)], begin + len(group)
            for split, writer in enumerate(writers):
                if (part == split).any():
                    writer.write_table(group.filter(pa.array(part == split)))
