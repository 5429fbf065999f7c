"""Files: written all at once or not at all, JSON lines with the place of an error, and logs from which a run resumes."""

import fcntl
import json
import os
import re
import shutil
import warnings
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from errno import EACCES, EDQUOT, EEXIST, EFBIG, ENOSPC, ENOTDIR, EPERM, EROFS
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vlm_calibration.records import DataError, RecordError

T = TypeVar("T")

MAX_NAMED = 5
"""Number of examples that a message names."""
UNWRITABLE = (EACCES, EDQUOT, EEXIST, EFBIG, ENOSPC, ENOTDIR, EPERM, EROFS)
"""Error numbers of a file that cannot be written: no space, no permission, a file in place of a folder."""


@contextmanager
def writing(path: Path, hint: str = "") -> Iterator[None]:
    """Turn a failure to write `path`, a file or folder, such as a full disk, into a DataError that ends with `hint`."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            number = cause.errno if isinstance(cause, OSError) else None
            # safetensors and tokenizers raise their own errors, with the system's number in the text.
            if match := re.search(r"(?:os error|Errno) (\d+)", str(cause)):
                number = int(match[1])
            if number in UNWRITABLE:
                raise DataError(f"cannot write {path}: {os.strerror(number)}{hint}") from error
            cause = cause.__cause__
        raise


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `path`, a file or folder, when the block ends without an error.

    A reader sees the old content or the new, never a part. Permissions follow the umask. `sync` first flushes the content to the
    disk, since some file systems report only then that they are full. A DataError if the path cannot be written.
    """
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        with writing(path, "; the previous content is unchanged" if path.exists() else ""):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            umask = os.umask(0o077)
            os.umask(umask)
            for path_written in [temporary] if temporary.is_file() else temporary.rglob("*"):
                if path_written.is_file():
                    # safetensors writes files that only their owner can read.
                    path_written.chmod(path_written.stat().st_mode | 0o666 & ~umask)
                    if sync:
                        with path_written.open("rb") as file:
                            os.fsync(file.fileno())
            if temporary.is_dir() and path.exists():
                # Deleting a folder takes time, so it gets another name first.
                path.replace(old)
            temporary.replace(path)
    finally:
        if old.exists() and not path.exists():
            old.replace(path)
        for leftover in (temporary, old):
            remove(leftover)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; see `replacing`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def json_number(name: str, value: float) -> float | int | None:
    """A metric as a JSON number: None for NaN, which JSON lacks; an integer for the count `n`."""
    if value != value:
        return None
    return int(value) if name.split("/", 1)[0] == "n" else value


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], *, lines: bool) -> None:
    """Write objects as JSON lines, or as one JSON array, in ASCII."""
    texts = [json.dumps(row) for row in rows]
    text = "\n".join(texts) if lines else "[\n" + ",\n".join(texts) + "\n]"
    write_text(path, text + "\n")


def hold(path: Path) -> FileIO:
    """Lock a file, where its file system has locks, until `release` or the end of this process: it is in use."""
    file = FileIO(path)
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def release(file: FileIO) -> None:
    """End the lock of `hold`, also for forked processes, which share it."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def is_held(path: Path) -> bool:
    """Whether a process holds this file; False where locks fail."""
    with FileIO(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
    return False


def clear_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed inside `replacing` in this folder."""
    for leftover in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class JsonLine(NamedTuple):
    """A line of a file of JSON lines, not decoded yet: its number, from 1, the offset of its first byte, and its bytes."""

    path: Path
    number: int
    offset: int
    content: bytes

    @property
    def where(self) -> str:
        """File and line number, for messages."""
        return f"{self.path}:{self.number}"

    def read(self, convert: Callable[[Any], T]) -> T:
        """Decode and convert the line; raises a DataError that names it if it is not JSON, or `convert` raises a ValueError."""
        try:
            return convert(parse_json(self.content))
        except ValueError as error:
            raise self.error(str(error)) from error

    def error(self, message: str) -> DataError:
        """The error to raise about this line."""
        return DataError(f"{self.where}: {message}")


def json_lines(path: Path) -> Iterator[JsonLine]:
    """The lines of a file that are not blank, without a byte order mark; raises a DataError if it cannot be read."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, content in enumerate(file, start=1):
                if number == 1 and content.startswith(BOM_UTF8):
                    offset, content = len(BOM_UTF8), content.removeprefix(BOM_UTF8)
                if content.strip():
                    yield JsonLine(path, number, offset, content)
                offset += len(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def parse_json(content: bytes | bytearray) -> Any:
    """Decode JSON in UTF-8, with or without a byte order mark; raises a RecordError if it is neither UTF-8 nor JSON."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}") from error


def read_json(path: Path) -> Any:
    """Decode a JSON file; raises a DataError that names the file, and the line of a syntax error."""
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except RecordError as error:
        cause, where = error.__cause__, str(path)
        if isinstance(cause, json.JSONDecodeError):
            where += f":{cause.lineno}"
        elif isinstance(cause, UnicodeDecodeError):
            line = cause.object.count(b"\n", 0, cause.start) + 1
            where += f":{line}"
        raise DataError(f"{where}: {error}") from error


def name_some(names: Iterable[object], total: int) -> str:
    """The first few of `total` names and the number of others: "'a', 'b' and 7 more"."""
    named = [repr(name) for name in islice(names, MAX_NAMED)]
    return ", ".join(named) + (f" and {total - len(named)} more" if total > len(named) else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
