"""The files of a data root, and the error about one that is missing.

A data root holds train, validation, calibration and test, as .jsonl or as .parquet, with the images that they name beside them.
"""

from __future__ import annotations

from pathlib import Path

from vlm_calibration.files import name_some
from vlm_calibration.records import DataError

SPLITS = ("train", "validation", "calibration", "test")
"""Names of the files of a data root, without their suffix."""
PRESETS = {".jsonl": "data/jsonl", ".parquet": "data/parquet"}
"""Suffix of the files -> the preset that reads them."""


class MissingFileError(DataError):
    """A file of queries does not exist. The message says what the folder has instead and how to make the file."""

    def __init__(self, path: Path) -> None:
        super().__init__("; ".join([f"{path}: no such file", *_instead(path)]))
        self.path = path


def _instead(path: Path) -> list[str]:
    """What to do about a missing file, as parts of a sentence."""
    folder = path.parent
    if not folder.is_dir():
        return [f"there is no folder {folder} either: give the folder of your data with --data-root"]
    files = sorted(p.name for p in folder.iterdir() if p.suffix in (*PRESETS, ".json") and p.is_file())
    parts = [f"{folder} has {name_some(files, len(files))}" if files else f"{folder} has no file of queries"]
    for suffix, preset in PRESETS.items():
        if suffix != path.suffix and path.with_suffix(suffix).name in files:
            return [*parts, f"read {path.with_suffix(suffix).name} with `--config {preset}`"]
    if path.stem in SPLITS:
        parts.append(f"`vlm-calibration data split FILE` makes {', '.join(SPLITS)} from one file")
    return parts
