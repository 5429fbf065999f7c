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


MUTANTS = [
    Mutant(
        "noise",
        "perturbation/noise.py",
        "np.sqrt(1 - alpha_bar)",
        "(1 - alpha_bar)",
        "perturbation/test_noise.py",
    ),
    Mutant("noise", "perturbation/noise.py", "if step == 0:", "if step <= 1:", "perturbation/test_noise.py"),
    Mutant(
        "noise",
        "perturbation/schedules.py",
        "/ (1 + self.offset)) ** 2",
        "/ (1 + self.offset))",
        "perturbation/test_schedules.py",
    ),
    Mutant(
        "noise",
        "data/noise.py",
        "if not takes_evidence:",
        "if region is None:",
        "data/test_noise.py",
    ),
    Mutant(
        "noise",
        "data/noise.py",
        "policy.wrong_answer_rate * (1.0 - confidence)",
        "policy.wrong_answer_rate * confidence",
        "data/test_wrong_answers.py",
    ),
    Mutant(
        "noise",
        "data/noise.py",
        "query_rng(policy.seed, epoch, query.id)",
        "query_rng(policy.seed, 0, query.id)",
        "data/test_noise.py",
    ),
    Mutant(
        "levels",
        "perturbation/levels.py",
        "return self.strengths()[::-1]",
        "return self.strengths()",
        "perturbation/test_levels.py",
    ),
    Mutant(
        "levels",
        "perturbation/levels.py",
        "cells = 100 // self.grid",
        "cells = 50 // self.grid",
        "perturbation/test_levels.py",
    ),
    Mutant(
        "labels",
        "data/collate.py",
        "labels[row, start : start + learned] = ids[:learned]",
        "labels[row, start : start + len(ids)] = ids",
        "data/test_collate.py",
    ),
    Mutant(
        "labels",
        "data/collate.py",
        "confidence_mask[row, start + answer_length : start + learned]",
        "confidence_mask[row, start : start + learned]",
        "data/test_collate.py",
    ),
    Mutant(
        "packing",
        "models/shared_prefix.py",
        "same_path = ((key == 0) | (key == query)) & (key >= 0)",
        "same_path = key >= 0",
        "models/test_shared_prefix.py",
    ),
    Mutant(
        "packing", "models/shared_prefix.py", "positions - shift", "positions", "models/test_shared_prefix.py"
    ),
    Mutant(
        "packing",
        "models/shared_prefix.py",
        "positions = [length + shared - 1,",
        "positions = [length + shared - 2,",
        "models/test_shared_prefix.py",
    ),
    Mutant(
        "losses",
        "losses/sequence.py",
        "(sums / lengths).mean()",
        "sums.sum() / lengths.sum()",
        "losses/test_sequence.py",
    ),
    Mutant("losses", "losses/sequence.py", "answer * correct)", "answer)", "losses/test_sequence.py"),
    Mutant(
        "losses",
        "losses/preference.py",
        "return -logsigmoid(self.beta * h)\n",
        "return -logsigmoid(h)\n",
        "losses/test_preference.py",
    ),
    Mutant(
        "losses",
        "losses/preference.py",
        "self.beta * h - self.gamma",
        "self.beta * h + self.gamma",
        "losses/test_preference.py",
    ),
    Mutant(
        "losses",
        "losses/distribution.py",
        "log_q.masked_fill(~scores.own, -torch.inf)",
        "log_q",
        "losses/test_distribution.py",
    ),
    Mutant(
        "counts",
        "metrics/table.py",
        "torch.bincount(place * 2 + correct.to(place.device)",
        "torch.bincount(place * 2 + ~correct.to(place.device)",
        "metrics/test_table.py",
    ),
    Mutant(
        "counts",
        "metrics/functional.py",
        'return bin_sums(table, n_bins, "uniform").gap.abs().sum(-1) / table.total',
        'return bin_sums(table, n_bins, "uniform").gap.sum(-1).abs() / table.total',
        "metrics/test_exact.py",
    ),
    Mutant(
        "grading",
        "text/grading.py",
        "(?:free|instead|in place) of",
        "(?:free|in place) of",
        "text/test_grading.py",
    ),
    Mutant(
        "grading",
        "text/grading.py",
        "reply in accepted or",
        "any(key in reply for key in accepted) or",
        "text/test_grading.py",
    ),
    Mutant(
        "resume",
        "callbacks/run_record.py",
        "same_content = None in contents or contents[0] == contents[1]",
        "same_content = True",
        "callbacks/test_resume.py",
    ),
    Mutant(
        "resume", "append_log.py", "if row.get(name) != value:", "if name not in row:", "test_append_log.py"
    ),
    Mutant(
        "threshold",
        "metrics/risk_control.py",
        "+= level / 2",
        "+= level",
        "metrics/test_risk_control.py",
    ),
    Mutant(
        "threshold",
        "metrics/risk_control.py",
        "            available = 0.0",
        "            pass",
        "metrics/test_risk_control.py",
    ),
    Mutant(
        "threshold",
        "text/known_questions.py",
        "if self.words and (new",
        "if not self.words and (new",
        "text/test_known_questions.py",
    ),
]


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
