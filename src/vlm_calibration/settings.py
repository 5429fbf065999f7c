"""Settings as JSON, by dotted names and as digests: how settings and files are compared.

Arguments are read back from the object, so that one built in Python counts like one that LightningCLI built from YAML.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def init_args(value: Any) -> dict[str, Any]:
    """The constructor arguments that an object keeps under their names, with or without a leading underscore."""
    arguments = {}
    for name in inspect.signature(type(value)).parameters:
        attribute = name if hasattr(value, name) else f"_{name}"
        if hasattr(value, attribute):
            arguments[name] = getattr(value, attribute)
    return arguments


def to_json(value: Any) -> Any:
    """A setting as JSON; an object becomes its `class_path` and its `init_args`, side by side."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    class_path = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"class_path": class_path, **to_json(init_args(value))}


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
    return digest([json.dumps(to_json(value))])


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
