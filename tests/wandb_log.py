"""Reads back what an offline W&B run has written: the records of its `.wandb` file, which are in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768
HEADER = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """The protocol buffers of a `.wandb` file."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", path
    at, parts = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block that holds no header is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        if kind == 0:
            break
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@dataclass
class OfflineRun:
    """An offline run.

    history: rows of what was logged, in order. config: what the run was configured with. artifacts: all of them, in order.
    folder: the run's own. name, project, entity: of the run.
    """

    folder: Path
    name: str = ""
    project: str = ""
    entity: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)

    @property
    def keys(self) -> set[str]:
        """Everything that has been logged."""
        return {key for row in self.history for key in row if not key.startswith("_")}

    def values(self, key: str) -> list[Any]:
        return [row[key] for row in self.history if key in row]

    def file(self, value: dict[str, Any]) -> Path:
        """The file of an image or table that was logged."""
        return self.folder / "files" / value["path"]

    def table(self, key: str) -> dict[str, Any]:
        """The columns and data of the last table that was logged under this name."""
        read: dict[str, Any] = json.loads(self.file(self.values(key)[-1]).read_text(encoding="utf-8"))
        return read


def read_run(run_directory: Path) -> OfflineRun:
    """The one offline run of a run directory."""
    [path] = (run_directory / "wandb").glob("offline-run-*/*.wandb")
    run = OfflineRun(path.parent)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.name, run.project, run.entity = record.run.display_name, record.run.project, record.run.entity
            _configure(run.config, record.run.config.update)
        elif kind == "config":
            _configure(run.config, record.config.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                _put(row, ["/".join(item.nested_key) or item.key], json.loads(item.value_json))
            run.history.append(row)
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
    return run


def _configure(config: dict[str, Any], items: Any) -> None:
    for item in items:
        _put(config, list(item.nested_key) or [item.key], json.loads(item.value_json))


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
