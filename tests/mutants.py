"""`python -m tests.mutants`: break one line of each core function in a copy of the checkout, and run the tests that must fail.

A mutant that no test notices is a gap in the tests. Prints a line for each, and ends with status 1 if one survives or if its line
is not in the source any more. A part of them: `python -m tests.mutants noise losses`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "src/vlm_calibration"
COPIED = ("src", "tests", "configs", "pyproject.toml", "README.md", "Makefile")


class Mutant(NamedTuple):
    """A change that tests must notice.

    Attributes:
        topic: what it breaks.
        file: in the package.
        line: text that occurs once in the file.
        change: what stands there instead.
        tests: file in `tests/` that must fail.
    """

    topic: str
    file: str
    line: str
    change: str
    tests: str


MUTANTS: list[Mutant] = []


def survives(mutant: Mutant, copy: Path) -> bool:
    """Whether the tests pass with the mutant in place of the line.

    Raises:
        ValueError: the line does not occur once, or the tests cannot be run.
    """
    path = copy / PACKAGE / mutant.file
    source = path.read_text(encoding="utf-8")
    if (n := source.count(mutant.line)) != 1:
        raise ValueError(f"{mutant.file}: {mutant.line!r} occurs {n} times, expected once")
    path.write_text(source.replace(mutant.line, mutant.change), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not nightly", f"tests/{mutant.tests}"]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    ended = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    path.write_text(source, encoding="utf-8")
    if ended.returncode not in (0, 1):
        raise ValueError(f"tests/{mutant.tests}: pytest ended with {ended.returncode}: {ended.stdout[-500:]}")
    return ended.returncode == 0


def main(topics: list[str]) -> int:
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        for mutant in MUTANTS:
            if topics and mutant.topic not in topics:
                continue
            try:
                result = "SURVIVES" if survives(mutant, copy) else "caught"
            except ValueError as error:
                result = f"ERROR: {error}"
            failed |= result != "caught"
            print(f"{result:8}  {mutant.topic}: {mutant.file}: {mutant.line.strip()!r}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
