"""`vlm-calibration config list|show|copy`: the presets that come with the package."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path

from vlm_calibration.arguments import Subcommands
from vlm_calibration.files import write_text
from vlm_calibration.presets import find_preset, preset_names
from vlm_calibration.records import DataError


def list_presets(pattern: str = "*") -> None:
    """List the presets with the first sentence of each.

    Args:
        pattern: names to list, such as "model/*"
    """
    if not (names := [name for name in preset_names() if fnmatch(name, pattern)]):
        raise ArgumentError(None, f"no preset matches {pattern!r}: there are {', '.join(preset_names())}")
    width = max(map(len, names))
    for name in names:
        lines = find_preset(name).read_text(encoding="utf-8").splitlines()
        comments = (line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines))
        print(f"{name:<{width}}  {' '.join(comments).split('. ')[0].split(': ')[0].rstrip('.')}")


def show(name: str) -> None:
    """Print a preset with its comments.

    Args:
        name: as `config list` prints it
    """
    sys.stdout.write(find_preset(name).read_text(encoding="utf-8"))


def copy(name: str, to: Path | None = None, *, overwrite: bool = False) -> None:
    """Copy a preset into a file of your own, which `--config` takes by its path.

    Args:
        name: as `config list` prints it
        to: the new file (default: the last part of the name, with .yaml, in the current folder)
        overwrite: replace the file if it exists
    """
    source = find_preset(name)
    target = Path(source.name) if to is None else to / source.name if to.is_dir() else to
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists: give another file, or --overwrite")
    write_text(target, source.read_text(encoding="utf-8"))
    print(f"wrote {target}: change it, and use it with --config {target}")


SUBCOMMANDS = Subcommands(
    "The presets that come with the package.", {"list": list_presets, "show": show, "copy": copy}
)
