"""Tiny models of the four kinds, built once, and the demo's scenes as files with queries about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_calibration.demo.source import DemoSource

from .tiny import build


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny model of a kind."""
    made: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="session")
def scene_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes so many of the demo's scenes as PNG files, and their queries without objects and regions as JSON lines."""

    def write(scenes: int, extra: list[dict[str, Any]] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("scenes")
        source = DemoSource("test", scenes=scenes)
        lines = []
        for query in source.queries():
            name = f"{query.image}.png"
            if not (folder / name).exists():
                Image.fromarray(source.load(query).image).save(folder / name)
            row = {**asdict(query), "image": name, "objects": [], "regions": []}
            lines.append(row)
        with (folder / "queries.jsonl").open("w", encoding="utf-8") as file:
            for row in [*lines, *(extra or [])]:
                file.write(json.dumps(row) + "\n")
        return folder / "queries.jsonl"

    return write
