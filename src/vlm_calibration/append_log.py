"""An append-only log of JSON lines, from which an interrupted run resumes.

Evaluations, region extraction and `vlm-calibration ask` write their results through it. Every line repeats the settings that
its content depends on, so results of different settings are never mixed.
"""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from vlm_calibration.files import append, writing
from vlm_calibration.records import DataError
from vlm_calibration.settings import flat


class SettingsChangedError(DataError):
    """A line was written with settings other than those of this run; `changed` has their names."""

    def __init__(self, message: str, changed: list[str]) -> None:
        super().__init__(message)
        self.changed = changed


class LogLine(NamedTuple):
    """A complete line of a log.

    Attributes:
        path: its file.
        offset: its first byte in the file.
        where: file and line number, for messages.
        row: the JSON object, with the settings.
    """

    path: Path
    offset: int
    where: str
    row: dict[str, Any]


class AppendLog:
    """JSON lines in one or several files, for results that must outlive the process that computes them.

    Each process appends to a file of its own, under a lock; all read the files of all processes. A last line without a newline
    was cut off when its process ended: readers ignore it, and the next process that appends to the file removes it.

    Args:
        path: the file that this process appends to.
        settings: JSON values by name, which every line repeats. They may be nested.
        remedy: what to do about a line that cannot be used, as the end of an error message.
        pattern: glob of the files of all processes, in the folder of `path`; None: there is only `path`.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], remedy: str, pattern: str | None = None
    ) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.remedy = remedy
        self.pattern = pattern or path.name
        self._file: FileIO | None = None
        self._is_trimmed = False

    def lines(self) -> Iterator[LogLine]:
        """The complete lines of all processes, file after file.

        Raises:
            SettingsChangedError: a line was written with other settings.
            DataError: a line is damaged.
        """
        for path in sorted(self.path.parent.glob(self.pattern)):
            offset = 0
            with path.open("rb") as file:
                for number, content in enumerate(file, start=1):
                    if content.endswith(b"\n"):
                        where = f"{path}:{number}"
                        yield LogLine(path, offset, where, self._parse(content, where))
                    offset += len(content)

    def reread(self, line: LogLine) -> dict[str, Any]:
        """The row of a line, read from its file again."""
        with line.path.open("rb") as file:
            file.seek(line.offset)
            return self._parse(file.readline(), line.where)

    def damaged(self, where: str, reason: object) -> DataError:
        """The error about a line that cannot be used."""
        return DataError(f"{where}: damaged: {reason}: {self.remedy}")

    def _parse(self, content: bytes, where: str) -> dict[str, Any]:
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self.damaged(where, error) from error
        if not isinstance(row, dict):
            raise self.damaged(where, "expected a JSON object")
        written = {name: row.get(name) for name in self.settings}
        before, now = dict(flat(written)), dict(flat(self.settings))
        if changed := [name for name in {**now, **before} if now.get(name) != before.get(name)]:
            was, found = before.get(changed[0]), now.get(changed[0])
            raise SettingsChangedError(
                f"{where}: written with {changed[0]} = {was!r}, found {found!r}: {self.remedy}", changed
            )
        return row

    def open(self) -> None:
        """Open this process's file and lock it; `append` does so too. The content stays as it is.

        Raises:
            DataError: it cannot be written, or another process is appending to it.
        """
        if self._file is not None:
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise DataError(f"{self.path}: another process is writing to it") from error
        except OSError as error:
            warnings.warn(f"{self.path}: cannot be locked: {error.strerror}", stacklevel=2)
        self._file, self._is_trimmed = file, False

    def append(self, *rows: Mapping[str, Any], sync: bool = False) -> int:
        """Append rows in one write, each followed by the settings.

        Args:
            sync: wait until they are on the disk.

        Returns:
            The first byte of the first row in the file.

        Raises:
            DataError: they cannot be written.
        """
        self.open()
        assert self._file is not None
        lines = [json.dumps({**row, **self.settings}, ensure_ascii=False) + "\n" for row in rows]
        with writing(self.path):
            if not self._is_trimmed:
                with self.path.open("rb") as content:
                    self._file.truncate(sum(len(line) for line in content if line.endswith(b"\n")))
                self._is_trimmed = True
            offset = os.fstat(self._file.fileno()).st_size
            append(self._file, "".join(lines).encode())
            if sync:
                os.fsync(self._file.fileno())
        return offset

    def close(self) -> None:
        """Close this process's file and release its lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def clear(self) -> None:
        """Remove the files of all processes."""
        self.close()
        for path in self.path.parent.glob(self.pattern):
            path.unlink(missing_ok=True)
