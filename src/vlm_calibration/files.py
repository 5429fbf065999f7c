"""Files that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import Any

from vlm_calibration.records import DataError

UNWRITABLE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EEXIST,
    }
)
"""What the system answers where a file cannot be written: no space, no permission, a file in place of a folder."""


@contextmanager
def writing(path: Path, hint: str = "") -> Iterator[None]:
    """A block that writes to `path`, a file or folder.

    Args:
        hint: end of the error message.

    Raises:
        DataError: it cannot be written, e.g. since the disk is full.
    """
    try:
        yield
    except Exception as error:
        reason = _why_unwritable(error)
        if reason is None:
            raise
        raise DataError(f"cannot write {path}: {reason}{hint}") from error


def _why_unwritable(error: BaseException | None) -> str | None:
    """The system's reason, also of an error that was raised from its own; None for errors that are not about writing."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors and tokenizers raise errors of their own, with the system's number in the text.
        if found := re.search(r"(?:os error|Errno) (\d+)", str(error)):
            number = int(found[1])
        if number in UNWRITABLE:
            return os.strerror(number)
        error = error.__cause__
    return None


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """A temporary path that becomes `path`, file or folder, when the block ends without an error.

    Args:
        sync: wait until it is on the disk: some file systems find out only then that they are full.

    Raises:
        DataError: it cannot be written, e.g. since the disk is full. What was there before is left as it was.
    """
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        with writing(path, "; what was there before is left as it was" if path.exists() else ""):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if sync:
                _sync(temporary)
            if temporary.is_dir() and path.exists():
                # Taking a folder apart takes time; under its name it is whole or gone.
                path.replace(old)
            temporary.replace(path)
    finally:
        if old.exists() and not path.exists():
            old.replace(path)
        for left in (temporary, old):
            remove(left)


def _sync(path: Path) -> None:
    for part in [path] if path.is_file() else (p for p in path.rglob("*") if p.is_file()):
        with part.open("rb") as file:
            os.fsync(file.fileno())


def append(file: RawIOBase, content: bytes) -> None:
    """Write all of it to a file without a buffer, which may take it in parts."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) or 0 :]


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def json_number(name: str, value: float) -> float | int | None:
    """A metric as JSON has it, which has no NaN: an undefined one is null. Counts are whole numbers."""
    if value != value:
        return None
    return int(value) if name.split("/", 1)[0] == "n" else value


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], *, lines: bool) -> None:
    """Write objects as lines of JSON or as an array, in ASCII, which any program reads."""
    texts = [json.dumps(row) for row in rows]
    text = "\n".join(texts) if lines else "[\n" + ",\n".join(texts) + "\n]"
    write_text(path, text + "\n")


def clear_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while `replacing` something in this folder has left there."""
    for path in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
