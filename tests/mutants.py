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

ROOT = Path(__file__).parents[1]
PACKAGE = "src/vlm_calibration"
COPIED = ("src", "tests", "configs", "pyproject.toml", "README.md", "Makefile")

MUTANTS: dict[tuple[str, str, str], dict[str, str]] = {
    ("noise", "perturbation/noise.py", "perturbation/test_noise.py"): {
        "np.sqrt(1 - alpha_bar)": "(1 - alpha_bar)",
        "if step == 0:": "if step <= 1:",
        "/ (1 + self.offset)) ** 2": "/ (1 + self.offset))",
    },
    ("noise", "data/noise.py", "data/test_noise.py"): {
        "if not takes_evidence:": "if region is None:",
        "query_rng(policy.seed, epoch, query.id)": "query_rng(policy.seed, 0, query.id)",
        "policy.wrong_answer_rate * (1.0 - confidence)": "policy.wrong_answer_rate * confidence",
    },
    ("levels", "perturbation/levels.py", "perturbation/test_levels.py"): {
        "return self.strengths()[::-1]": "return self.strengths()",
        "cells = 100 // self.grid": "cells = 50 // self.grid",
    },
    ("labels", "data/collate.py", "data/test_collate.py"): {
        "labels[row, start : start + learned] = ids[:learned]": "labels[row, start : start + len(ids)] = ids",
        "confidence_mask[row, start + answer_length : start + learned]": "confidence_mask[row, start : start + learned]",
    },
    ("packing", "models/shared_prefix.py", "models/test_shared_prefix.py"): {
        "same_path = ((key == 0) | (key == query)) & (key >= 0)": "same_path = key >= 0",
        "positions - shift": "positions",
        "range(length - 1, end)": "range(length - 2, end - 1)",
    },
    ("losses", "losses/sequence.py", "losses/test_candidates.py"): {
        "(sums / lengths).mean()": "sums.sum() / lengths.sum()",
        "answer * correct)": "answer)",
    },
    ("losses", "losses/preference.py", "losses/test_preference.py"): {
        "return -logsigmoid(self.beta * h)\n": "return -logsigmoid(h)\n",
        "self.beta * h - self.gamma": "self.beta * h + self.gamma",
    },
    ("losses", "losses/distribution.py", "losses/test_distribution.py"): {
        "log_q.masked_fill(~among, -torch.inf)": "log_q",
    },
    ("counts", "metrics/table.py", "metrics/test_table.py"): {
        "torch.bincount(place * 2 + correct.to(place.device)": "torch.bincount(place * 2 + ~correct.to(place.device)",
    },
    ("counts", "metrics/functional.py", "metrics/test_exact.py"): {
        'return bin_sums(table, 10, "uniform").gap.abs().sum(-1) / table.total': 'return bin_sums(table, 10, "uniform").gap.sum(-1).abs() / table.total',
    },
    ("grading", "text/grading.py", "text/test_grading.py"): {
        "(?:free|instead|in place) of": "(?:free|in place) of",
        "reply in accepted or": "any(key in reply for key in accepted) or",
    },
    ("resume", "callbacks/run_directory.py", "callbacks/test_resume.py"): {
        "same_content = None in contents or contents[0] == contents[1]": "same_content = True",
    },
    ("resume", "files.py", "test_files.py"): {
        "if row.get(name) != value:": "if name not in row:",
    },
    ("threshold", "metrics/risk_control.py", "metrics/test_risk_control.py"): {
        "+= level / 2": "+= level",
        "            available = 0.0": "            pass",
    },
    ("threshold", "estimators/decision.py", "text/test_questions.py"): {
        "if self.words and (new": "if not self.words and (new",
    },
}
"""(topic, file of the package, file of `tests/` that must fail) -> a text that occurs once in the file -> what stands there instead."""


def survives(copy: Path, file: str, tests: str, line: str, change: str) -> bool:
    """Whether the tests pass with the change in place of the line.

    Raises:
        ValueError: the line does not occur once, or the tests cannot be run.
    """
    path = copy / PACKAGE / file
    source = path.read_text(encoding="utf-8")
    if (n := source.count(line)) != 1:
        raise ValueError(f"occurs {n} times, expected once")
    path.write_text(source.replace(line, change), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not nightly", f"tests/{tests}"]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    ended = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    path.write_text(source, encoding="utf-8")
    if ended.returncode not in (0, 1):
        raise ValueError(f"tests/{tests}: pytest ended with {ended.returncode}: {ended.stdout[-500:]}")
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
        for (topic, file, tests), changes in MUTANTS.items():
            for line, change in changes.items() if not topics or topic in topics else ():
                try:
                    result = "SURVIVES" if survives(copy, file, tests, line, change) else "caught"
                except ValueError as error:
                    result = f"ERROR: {error}"
                failed |= result != "caught"
                print(f"{result:8}  {topic}: {file}: {line.strip()!r}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
