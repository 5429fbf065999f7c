"""CPU seconds of each help page and mistake in a new process, and of the import: `python -m tests.performance.startup`.

Target: two seconds at most, about one for a mistake.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from ..test_help import MISTAKES, NAMES

REPEATED = 3


def seconds(*arguments: str) -> float:
    """Median CPU seconds of Python with these arguments."""
    times = []
    for _ in range(REPEATED):
        before = os.times()
        subprocess.run([sys.executable, *arguments], check=False, capture_output=True)
        after = os.times()
        times.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    return statistics.median(times)


def main() -> None:
    print(f"| command | CPU seconds, median of {REPEATED} |\n|---|---|")
    for code in ("import vlm_calibration", "from vlm_calibration import Plan, parse_confidence"):
        print(f"| `{code}` | {seconds('-c', code):.2f} |", flush=True)
    for command in ("--version", *(f"{name} --help".strip() for name in NAMES), *MISTAKES):
        took = seconds("-m", "vlm_calibration.cli", *command.split())
        print(f"| `vlm-calibration {command}` | {took:.2f} |", flush=True)


if __name__ == "__main__":
    main()
