"""An append-only log of JSON lines, from which an interrupted run resumes.

Every line repeats what its content depends on, such as the digest of the run's record, so results of different settings never mix.
"""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from vlm_calibration.files import JsonLine, json_lines, parse_json, writing
from vlm_calibration.records import DataError, RecordError


class SettingsChangedError(DataError):
    """A line was written with other settings than those of this run."""


class AppendLog:
    """JSON lines in one or several files, for results that must outlive the process that computes them.

    Each process appends to its own file, under a lock, and reads the files of all. A last line without a newline was cut off when its
    process ended: readers ignore it, and the next `append` to the file removes it.

    Args:
        path: the file that this process appends to.
        settings: JSON values by name, which every line repeats.
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

    def lines(self) -> Iterator[tuple[JsonLine, dict[str, Any]]]:
        """The complete lines of all files, with their objects; a DataError if one is damaged, or a SettingsChangedError."""
        for path in sorted(self.path.parent.glob(self.pattern)):
            for line in json_lines(path):
                if line.content.endswith(b"\n"):
                    yield line, self._row(line)

    def reread(self, line: JsonLine) -> dict[str, Any]:
        """The object of a line whose content was dropped, read from its file again."""
        with line.path.open("rb") as file:
            file.seek(line.offset)
            return self._row(line._replace(content=file.readline()))

    def damaged(self, where: str, reason: object) -> DataError:
        """The error about a line that cannot be used."""
        return DataError(f"{where}: damaged: {reason}: {self.remedy}")

    def _row(self, line: JsonLine) -> dict[str, Any]:
        try:
            row = parse_json(line.content)
        except RecordError as error:
            raise self.damaged(line.where, error) from error
        if not isinstance(row, dict):
            raise self.damaged(line.where, "expected a JSON object")
        for name, value in self.settings.items():
            if row.get(name) != value:
                written = f"written with {name} = {row.get(name)!r}, found {value!r}"
                raise SettingsChangedError(f"{line.where}: {written}: {self.remedy}")
        return row

    def open(self) -> None:
        """Open and lock this process's file; raises a DataError if it cannot be written, or another process has it."""
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

    def append(self, *rows: Mapping[str, Any], sync: bool = False) -> None:
        """Append rows and the settings, and with `sync` wait until they are on the disk; raises a DataError as `open` does."""
        self.open()
        assert self._file is not None
        lines = [json.dumps({**row, **self.settings}, ensure_ascii=False) + "\n" for row in rows]
        with writing(self.path):
            if not self._is_trimmed:
                with self.path.open("rb") as content:
                    self._file.truncate(sum(len(line) for line in content if line.endswith(b"\n")))
                self._is_trimmed = True
            rest = memoryview("".join(lines).encode())
            while rest:
                # An unbuffered file may accept only a part at each call.
                rest = rest[self._file.write(rest) or 0 :]
            if sync:
                os.fsync(self._file.fileno())

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
