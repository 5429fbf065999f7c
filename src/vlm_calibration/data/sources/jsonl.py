"""Source for one's own data: queries in a JSONL file, images in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vlm_calibration.data.sources.base import OnBadRecord
from vlm_calibration.data.sources.query_file import QueryFile
from vlm_calibration.files import json_lines, parse_json
from vlm_calibration.progress import track
from vlm_calibration.records import DataError, Query, RecordError, query_from_dict, query_validator

PARQUET = b"PAR1"
"""The first bytes of a Parquet file."""
MB = 1e6


class JsonlSource(QueryFile):
    """One query a line, a JSON object; blank lines are skipped.

    Args:
        path: the JSONL file.
        root: folder that image paths are relative to; by default the folder of `path`. No image may lie outside it.
        on_bad_record: "raise" stops at the first invalid record; "skip" leaves such records out, with a warning.
    """

    place, where = "on line", "{path}:{number}"

    def __init__(self, path: str, root: str | None = None, on_bad_record: OnBadRecord = "raise") -> None:
        super().__init__(path, None if root is None else Path(root), on_bad_record)

    def records(self) -> Iterator[tuple[int, int, bytes]]:
        size = self.path.stat().st_size / MB if self.path.is_file() else 0.0
        lines = json_lines(self.path)
        for line in track(lines, f"checking {self.path}", size, "MB", lambda line: len(line.content) / MB):
            if line.number == 1 and line.content.startswith(PARQUET):
                source = "vlm_calibration.data.sources.parquet.ParquetSource"
                raise DataError(f"{self.path}: a Parquet file, expected JSON lines: class_path: {source}")
            yield line.offset, line.number, line.content

    def decode(self, content: bytes) -> Query:
        try:
            return query_validator().validate_json(content)
        except ValueError:
            # Explains what is wrong, and accepts a byte order mark.
            return query_from_dict(parse_json(content))

    def lines(self, positions: Iterable[int]) -> Iterator[bytes]:
        """The lines that begin at these bytes of the file."""
        with self.path.open("rb") as file:
            for position in positions:
                file.seek(position)
                yield file.readline()

    def read(self, positions: Sequence[int]) -> Iterator[Query]:
        lines = self.lines(positions)
        for position in positions:
            try:
                query = self.decode(next(lines))
            except (OSError, RecordError) as error:
                where = f"{self.path}: changed while in use, at byte {position}"
                raise DataError(f"{where}: {error}") from error
            yield query
