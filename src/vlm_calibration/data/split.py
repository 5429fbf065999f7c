"""Splits one file of queries into train, validation, calibration and test by image, so that no image is in two of them.

Images with equal content or nearly equal looks stay together. Which split a group of images goes to depends on their content
and the seed alone, never on the order of the lines. Records are copied as they are.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_calibration.data.image_hash import ImageHash, hash_images, near_groups
from vlm_calibration.data.sources.base import BadRecords, OnBadRecord
from vlm_calibration.data.sources.data_root import PRESETS, SPLITS
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.data.sources.parquet import ParquetSource
from vlm_calibration.files import replacing
from vlm_calibration.records import DataError, Query
from vlm_calibration.text.grading import parse_answer

Source: TypeAlias = JsonlSource | ParquetSource


class SplitFile(NamedTuple):
    """One of the files that were written.

    Attributes:
        path: the file.
        queries: number of queries.
        images: number of images; copies of one under two names count twice.
        yes: share of the yes/no questions whose answer is yes, in [0, 1]; None without any.
    """

    path: Path
    queries: int
    images: int
    yes: float | None


class SplitResult(NamedTuple):
    """The files of a split.

    Attributes:
        files: in the order of `SPLITS`.
        bad: a message for each record that was left out.
        largest: names of the images of the largest group of nearly equal images.
    """

    files: tuple[SplitFile, ...]
    bad: tuple[str, ...]
    largest: tuple[str, ...]


def open_source(path: Path, root: Path, on_bad_record: OnBadRecord) -> Source:
    """The source of a .jsonl or .parquet file.

    Raises:
        DataError: it has another suffix, or is a folder.
    """
    if path.is_dir():
        raise DataError(f"{path}: a folder, expected a file of queries, .jsonl or .parquet")
    if path.suffix == ".jsonl":
        return JsonlSource(str(path), str(root), on_bad_record)
    if path.suffix == ".parquet":
        return ParquetSource(str(path), str(root), on_bad_record=on_bad_record)
    raise DataError(f"{path}: expected a file of queries that ends in {' or '.join(PRESETS)}")


def output_paths(path: Path, out: Path, overwrite: bool) -> dict[str, Path]:
    """The files to write, by the name of their split.

    Raises:
        DataError: one exists and may not be overwritten, or is the file to split.
    """
    paths = {name: out / f"{name}{path.suffix}" for name in SPLITS}
    for file in paths.values():
        if file.exists() and path.exists() and file.samefile(path):
            raise DataError(
                f"{path}: is the file to split and would be overwritten: rename it, or write elsewhere with --out"
            )
        if file.exists() and not overwrite:
            raise DataError(f"{file}: exists already: --overwrite replaces it, or write elsewhere with --out")
    return paths


class ImagesOfQueries:
    """The queries of a source by image, and the images by group.

    Args:
        source: its `queries` have been read.
        near: keep nearly equal images together, not only equal ones.

    Raises:
        DataError: an image cannot be read, if bad records stop the source.
    """

    def __init__(self, source: Source, near: bool) -> None:
        self.bad = BadRecords(source.on_bad_record)
        self.first: list[Query] = []
        indices: dict[str, int] = {}
        of_query = []
        for query in source.queries():
            index = indices.setdefault(source.image_id(query), len(self.first))
            if index == len(self.first):
                self.first.append(query)
            of_query.append(index)
        self.of_query = np.array(of_query)
        contents = [partial(source.image_content, query) for query in self.first]
        hashes: list[ImageHash | str] = []
        for query, hashed in zip(self.first, hash_images(contents), strict=True):
            if isinstance(hashed, str):
                others = int((self.of_query == len(hashes)).sum()) - 1
                also = f" and {others} more" if others else ""
                self.bad.add(f"{source.path}: record {query.id!r}{also}: {query.image}: {hashed}")
            hashes.append(hashed)
        self.groups, self.keys = _group(hashes, near)
        """Group of each image, -1 if it cannot be read; a text for each group that depends on its images alone."""


def _group(hashes: Sequence[ImageHash | str], near: bool) -> tuple[np.ndarray, list[str]]:
    groups = np.full(len(hashes), -1, dtype=np.int64)
    usable = [i for i, hashed in enumerate(hashes) if isinstance(hashed, ImageHash)]
    valid = [hashed for hashed in hashes if isinstance(hashed, ImageHash)]
    digests = [hashed.digest for hashed in valid]
    if near and valid:
        labels = near_groups(np.array([h.bits for h in valid]), np.stack([h.copy for h in valid]))
    else:
        labels = np.unique(digests, return_inverse=True)[1].astype(np.int64)
    groups[usable] = labels
    keys: dict[int, str] = {}
    for label, text in zip(labels.tolist(), digests, strict=True):
        keys[label] = min(text, keys.get(label, text))
    return groups, [keys[label] for label in range(len(keys))]


def assign_groups(keys: Sequence[str], sizes: Sequence[int], shares: Sequence[float], seed: int) -> list[int]:
    """The split of each group, as an index of `shares`.

    Groups are taken in the order of a hash of key and seed, those that are larger than a split first. Each goes to the split that is filled least in proportion to its
    share, among those that it fits into; a group that fits into none goes where most room is left. So the shares differ from
    those asked for by less than one group, unless a group is larger than a split.

    Args:
        keys: text that identifies the group.
        sizes: number of queries of the group.
        shares: share of the queries that each split is to get, above 0, with sum 1.
        seed: another seed gives another split.

    Raises:
        DataError: there are fewer groups than splits.
    """
    if len(keys) < len(shares):
        raise DataError(
            f"{len(keys)} different images are too few for {len(shares)} splits without a shared image; nearly identical "
            "images count as one"
        )
    hashed = [hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest() for key in keys]
    targets = np.array(shares) * sum(sizes)
    order = sorted(range(len(keys)), key=lambda group: (sizes[group] <= targets.min(), hashed[group]))
    counts, groups = np.zeros(len(shares)), np.zeros(len(shares), dtype=int)
    chosen = [0] * len(keys)
    for group in order:
        room = targets - counts
        fits = room > sizes[group] - 1e-6
        split = int(np.where(fits, counts / targets, np.inf).argmin() if fits.any() else room.argmax())
        chosen[group] = split
        counts[split] += sizes[group]
        groups[split] += 1
    for split in np.flatnonzero(groups == 0).tolist():
        # Less than one query was asked for. The smallest group of the split with most groups moves here.
        largest = int(groups.argmax())
        moved = min((g for g in order if chosen[g] == largest), key=sizes.__getitem__)
        chosen[moved] = split
        groups[largest] -= 1
        groups[split] += 1
    return chosen


def split_queries(
    source: Source,
    paths: Mapping[str, Path],
    shares: Sequence[float],
    seed: int,
    images: ImagesOfQueries,
) -> SplitResult:
    """Assign the groups of images and write the files of all splits, or none.

    Args:
        source: the queries.
        paths: name of a split -> file to write.
        shares: share of the queries for each of `paths`.
        seed: of the assignment.
        images: the images of the source.

    Raises:
        DataError: there are too few images, or a file cannot be written.
    """
    group_of_query = images.groups[images.of_query]
    sizes = np.bincount(group_of_query[group_of_query >= 0], minlength=len(images.keys))
    chosen = np.array([*assign_groups(images.keys, sizes.tolist(), shares, seed), -1])
    split_of_query = chosen[group_of_query]
    write = _write_lines if isinstance(source, JsonlSource) else _write_rows
    with ExitStack() as stack:
        temporary = [stack.enter_context(replacing(path)) for path in paths.values()]
        write(source, split_of_query, temporary)  # type: ignore[arg-type]
        for file in temporary:
            _flush(file)
        for path in paths.values():
            # Should this process be killed between two renames, a file is missing; otherwise old and new would mix.
            path.unlink(missing_ok=True)
    files = tuple(_counts(source, path, split_of_query == i, images) for i, path in enumerate(paths.values()))
    [(label, _)] = Counter(images.groups[images.groups >= 0].tolist()).most_common(1)
    largest = tuple(images.first[i].image for i in np.flatnonzero(images.groups == label))
    return SplitResult(files, (*source.bad.messages, *images.bad.messages), largest)


def _counts(source: Source, path: Path, members: np.ndarray, images: ImagesOfQueries) -> SplitFile:
    queries = source.queries()
    answers = [
        parse_answer(query.answer, "yes_no")
        for query in (queries[i] for i in np.flatnonzero(members).tolist())
        if query.answer_type == "yes_no"
    ]
    yes = answers.count("yes") / len(answers) if answers else None
    return SplitFile(path, int(members.sum()), len(np.unique(images.of_query[members])), yes)


def _write_lines(source: JsonlSource, split_of_query: np.ndarray, paths: Sequence[Path]) -> None:
    """Copy lines unchanged, but for a byte order mark and a missing end of the last line."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for index, split in enumerate(split_of_query.tolist()):
            if split >= 0:
                line = source.line(index).removeprefix(b"\xef\xbb\xbf")
                files[split].write(line if line.endswith(b"\n") else line + b"\n")


def _write_rows(source: ParquetSource, split_of_query: np.ndarray, paths: Sequence[Path]) -> None:
    """Copy rows with the schema and metadata of the file, one row group of it in memory at a time."""
    file = pq.ParquetFile(source.path)
    split_of_row = np.full(file.metadata.num_rows, -1)
    split_of_row[source.row_numbers()] = split_of_query
    with ExitStack() as stack:
        writers = [stack.enter_context(pq.ParquetWriter(path, file.schema_arrow)) for path in paths]
        for writer, table in _tables(file, split_of_row, len(paths)):
            writers[writer].write_table(table)


def _tables(file: pq.ParquetFile, split_of_row: np.ndarray, splits: int) -> Iterator[tuple[int, pa.Table]]:
    """Tables of each split, as many rows as a row group of the file."""
    pending: list[list[pa.Table]] = [[] for _ in range(splits)]
    begin = 0
    for number in range(file.num_row_groups):
        group = file.read_row_group(number)
        part, begin = split_of_row[begin : begin + len(group)], begin + len(group)
        for split, tables in enumerate(pending):
            tables.append(group.filter(pa.array(part == split)))
            if sum(map(len, tables)) >= len(group):
                yield split, pa.concat_tables(tables)
                tables.clear()
    for split, tables in enumerate(pending):
        if sum(map(len, tables)):
            yield split, pa.concat_tables(tables)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def check_shares(shares: Iterable[float]) -> None:
    """Make sure that there is a share for each of `SPLITS`, above 0, and that they add up to 1.

    Raises:
        DataError: otherwise.
    """
    shares = list(shares)
    if len(shares) != len(SPLITS) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise DataError(
            f"--shares: expected {len(SPLITS)} numbers above 0 with sum 1, for {', '.join(SPLITS)}, found "
            f"{' '.join(f'{share:g}' for share in shares)}"
        )
