"""Parsed configurations of stages, and folders with published or tiny architectures, for estimates of memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.commands.lightning_cli import ParsedCLI
from vlm_calibration.presets import resolve_configs

from ..models.processors import cached_family
from ..models.published import MODELS

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="package")
def parse() -> Callable[..., Any]:
    """Parses files under configs/ and further arguments as a subcommand does; the parser takes seconds to build."""
    before = sys.argv
    sys.argv = ["vlm-calibration", "fit", "--config", str(CONFIGS / "sft.yaml")]
    try:
        parser = ParsedCLI().parser
    finally:
        sys.argv = before

    def parsed(*files: str, **settings: Any) -> Any:
        command = "fit" if files[0] in ("sft.yaml", "dpo.yaml") else "test"
        command = "predict" if files[0] == "regions.yaml" else command
        arguments = [a for name in files for a in ("--config", str(CONFIGS / name))]
        keys = [f"--{k.replace('__', '.')}={v}" for k, v in settings.items()]
        return parser.parse_args(resolve_configs([command, *arguments, *keys]))[command]

    return parsed


@pytest.fixture(scope="package")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Saves the configuration of a published model, by the name of its file; returns the folder."""
    folder = tmp_path_factory.mktemp("published")

    def saved(name: str) -> str:
        if not (folder / name).exists():
            MODELS[name].config().save_pretrained(folder / name)
        return str(folder / name)

    return saved


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Saves the configuration of a tiny model of a family; returns the folder."""
    folder = tmp_path_factory.mktemp("tiny")

    def saved(family: str) -> str:
        if not (folder / family).exists():
            cached_family(family).model().config.save_pretrained(folder / family)
        return str(folder / family)

    return saved
