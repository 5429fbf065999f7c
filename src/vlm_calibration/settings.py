"""How settings and files are compared: by dotted names and by digests."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def init_args(value: Any) -> dict[str, Any]:
    """The constructor arguments that an object keeps under their names, with or without an underscore in front."""
    arguments = {}
    for name in inspect.signature(type(value)).parameters:
        attribute = name if hasattr(value, name) else f"_{name}"
        if hasattr(value, attribute):
            arguments[name] = getattr(value, attribute)
    return arguments


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of nested settings with its dotted name; a list of plain values is one value."""
    if isinstance(value, Mapping) and value:
        items = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, list) and any(isinstance(part, Mapping | list) for part in value):
        items = [(str(number), part) for number, part in enumerate(value)]
    else:
        yield name, value
        return
    for key, part in items:
        yield from flat(part, f"{name}.{key}" if name else key)


def settings_digest(value: Any) -> str:
    """The digest of a setting: equal for equal values, and for objects of one class with equal arguments."""

    def of_object(value: Any) -> Any:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}", **init_args(value)}

    return digest([json.dumps(value, default=of_object)])


def digest(parts: Iterable[str | bytes]) -> str:
    """BLAKE2b of all parts as if they were joined, 32 hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(part.encode() if isinstance(part, str) else part)
    return hashed.hexdigest()


def file_digest(path: Path) -> str:
    """The digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
