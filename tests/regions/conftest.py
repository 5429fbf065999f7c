"""Tiny detectors and segmenters, built once, and the demo's scenes as files with queries."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_calibration.demo.source import DemoSource

from .tiny import build


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Returns the folder of a tiny model by name."""
    return lru_cache(lambda name: build(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def scene_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a number of the demo's scenes as PNG files, and their queries without objects and regions as JSON lines."""

    def write(scenes: int, extra: list[dict[str, Any]] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("scenes")
        source = DemoSource("test", scenes=scenes)
        lines = []
        for query in source.queries():
            name = f"{query.image}.png"
            Image.fromarray(source.load(query).image).save(folder / name)
            lines.append({**asdict(query), "image": name, "objects": [], "regions": []})
        path = folder / "queries.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (*lines, *(extra or []))), encoding="utf-8")
        return path

    return write
