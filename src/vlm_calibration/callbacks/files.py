"""Files that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path`, file or folder, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        yield temporary
        if temporary.is_dir() and path.exists():
            # Taking a folder apart takes time; under its name it is whole or gone.
            path.replace(old)
        temporary.replace(path)
    finally:
        for left in (temporary, old):
            _remove(left)


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def json_number(name: str, value: float) -> float | int | None:
    """A metric as JSON has it, which has no NaN: an undefined one is null. Counts are whole numbers."""
    if value != value:
        return None
    return int(value) if name.split("/", 1)[0] == "n" else value


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], *, lines: bool) -> None:
    """Write objects as lines of JSON or as an array, in ASCII, which any program reads."""
    texts = [json.dumps(row) for row in rows]
    text = "\n".join(texts) if lines else "[\n" + ",\n".join(texts) + "\n]"
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="ascii")


def clear_leftovers(folder: Path, is_own: Callable[[str], bool] | None = None) -> None:
    """Remove what a process that was killed while `replacing` something in this folder has left there.

    Args:
        is_own: whether nobody else may be writing what has this name; None: nobody writes here.
    """
    for left in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        # ".NAME.PROCESS.tmp"
        if is_own is None or is_own(left.name[1:].rsplit(".", 2)[0]):
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
