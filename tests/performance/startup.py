"""Seconds to print each help page in a new process: `python -m tests.performance.startup`.

Target: less than two seconds for commands that need no trainer.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from ..test_help import LIGHT

REPEATED = 3


def seconds(*arguments: str) -> float:
    """Median seconds of a command."""
    times = []
    for _ in range(REPEATED):
        began = time.perf_counter()
        command = [sys.executable, "-m", "vlm_calibration.cli", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    pages = [["--version"], ["--help"], *([*command.split(), "--help"] for command in LIGHT)]
    print(f"| command | seconds, median of {REPEATED} |\n|---|---|")
    for arguments in pages:
        print(f"| `vlm-calibration {' '.join(arguments)}` | {seconds(*arguments):.2f} |", flush=True)


if __name__ == "__main__":
    main()
