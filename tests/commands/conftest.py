"""Folders with published architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ..models.published import MODELS

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="package")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Saves the configuration of a published model, by the name of its file; returns the folder."""
    folder = tmp_path_factory.mktemp("published")

    def saved(name: str) -> str:
        if not (folder / name).exists():
            MODELS[name].config().save_pretrained(folder / name)
        return str(folder / name)

    return saved
