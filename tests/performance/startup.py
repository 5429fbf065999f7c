"""Seconds until each page of help is there, in a process of its own: `python -m tests.performance.startup`.

What needs no trainer is meant to take less than two.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from ..test_help import LIGHT

REPEATED = 3


def seconds(*arguments: str) -> float:
    """The median of some runs, in seconds."""
    found = []
    for _ in range(REPEATED):
        began = time.perf_counter()
        command = [sys.executable, "-m", "vlm_calibration.cli", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def main() -> None:
    pages = [["--version"], ["--help"], *([*command.split(), "--help"] for command in LIGHT)]
    print(f"| command | seconds, median of {REPEATED} |\n|---|---|")
    for arguments in pages:
        print(f"| `vlm-calibration {' '.join(arguments)}` | {seconds(*arguments):.2f} |", flush=True)


if __name__ == "__main__":
    main()
