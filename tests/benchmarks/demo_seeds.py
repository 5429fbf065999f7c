"""The demo over several seeds: `python -m tests.benchmarks.demo_seeds` prints what the README states.

Behind it is what an isotonic map of the base model's confidence comes to, which costs no training: it mends the calibration
error, and ranks no better. "Apart" are intervals that do not overlap.
Each seed has its own noise, order of data, adapter initialisation and test noise; the base model, its levels and the test
scenes are the same. Values are mean ± standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from vlm_calibration.estimators.predictions import VERBALIZED
from vlm_calibration.reporting.report_data import read_systems
from vlm_calibration.reporting.report_table import RAW, Comparison, Row, cell, compare

LOSSES = "vlm_calibration.losses.preference."
STAGE_1 = {
    "sft-paper": ["--config", "configs/experiment/paper.yaml"],
    "sft": [],
}
# Stage 2 from the adapter of "sft", each unlike the default in one thing.
STAGE_2 = {
    "dpo": [],
    "dpo-level": ["--data.pairs.target", "level"],
    "dpo-recalibrated": ["--data.pairs.target", "recalibrated"],
    "dpo-coarse": ["--data.pairs.grid", "null"],
    "simpo": [
        *("--model.init_args.loss", f"{LOSSES}SimPO"),
        *("--model.init_args.loss.init_args.beta", "2.0"),
    ],
    "ordinal": [
        *("--model.init_args.loss", f"{LOSSES}Ordinal"),
        *("--model.init_args.loss.init_args.beta", "0.3"),
    ],
    "listwise": [
        *("--model.init_args.loss", f"{LOSSES}Listwise"),
        *("--model.init_args.loss.init_args.beta", "0.3"),
    ],
}
PAPER_2 = [
    *("--config", "configs/experiment/paper.yaml", "--config", "configs/experiment/paper_dpo.yaml"),
    # As in the Makefile: at ours it collapses.
    *("--model.init_args.optimizer.lr", "3.0e-4"),
]
SYSTEMS = {
    "base": "base",
    "sft-paper": "SFT, paper's preset",
    "dpo-paper": "SFT + SimPO, paper's preset",
    "sft": "SFT",
    "dpo": "SFT + DPO (target: expected)",
    "dpo-level": "SFT + DPO, target: level",
    "dpo-recalibrated": "SFT + DPO, target: recalibrated",
    "dpo-coarse": "SFT + DPO, target: expected, grid: null",
    "simpo": "SFT + SimPO",
    "ordinal": "SFT + ordinal",
    "listwise": "SFT + listwise",
    "oracle": "level oracle",
}
PARTS = {
    "": "whole split",
    "/clean": "clean",
    "/noised": "region noise",
    "/shifted": "shifted",
    "/existence": "existence (yes/no)",
    "/position": "corner (short)",
}
METRICS = {
    "accuracy": "accuracy",
    "ece": "ECE",
    "brier": "Brier",
    "auroc": "AUROC",
    "parse_failure_rate": "unread",
}


def start(*arguments: str, threads: int = 1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vlm_calibration.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=environment, stdout=sys.stderr)


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"failed: {process.args}")


def into(folder: Path) -> list[str]:
    return ["--trainer.default_root_dir", str(folder)]


def side_by_side(fits: dict[Path, list[str]], resume: bool) -> None:
    """Train one adapter on each core, as `make demo` does, until there is one in each folder."""
    missing = [
        (folder, fit) for folder, fit in fits.items() if not (resume and (folder / "adapter").is_dir())
    ]
    for first in range(0, len(missing), 2):
        for fit in [
            start("fit", *fit, *into(folder), "--overwrite") for folder, fit in missing[first : first + 2]
        ]:
            finish(fit)


def run_seed(seed: int, root: Path, resume: bool) -> dict[str, dict[str, float]]:
    """Train all adapters with this seed and evaluate them; system -> metrics."""
    own = ["--seed_everything", str(seed), "--data.noise.seed", str(seed)]
    folders = {name: root / f"{name}-{seed}" for name in SYSTEMS if name not in ("base", "oracle")}
    side_by_side(
        {folders[name]: ["--config", "configs/sft.yaml", *extra, *own] for name, extra in STAGE_1.items()},
        resume,
    )

    def stage_2(start_from: str, extra: list[str]) -> list[str]:
        adapter = ["--model.init_args.adapter", str(folders[start_from] / "adapter")]
        return ["--config", "configs/dpo.yaml", *extra, *own, *adapter]

    side_by_side(
        {
            **{folders[name]: stage_2("sft", extra) for name, extra in STAGE_2.items()},
            folders["dpo-paper"]: stage_2("sft-paper", PAPER_2),
        },
        resume,
    )
    evaluated = root / f"eval-{seed}"
    adapters = json.dumps({name: str(folder / "adapter") for name, folder in folders.items()})
    finish(
        start(
            *("test", "--config", "configs/eval/demo.yaml", *own, *into(evaluated)),
            *("--model.init_args.adapters", adapters, "--model.init_args.estimators", "[]"),
            threads=2,
        )
    )
    return {s: json.loads((evaluated / s / "metrics.json").read_text()) for s in SYSTEMS}


def spread(values: list[float | None]) -> str:
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "-"
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):.3f} ± {deviation:.3f}"


def markdown(runs: list[dict[str, dict[str, float]]]) -> str:
    lines = []
    for suffix, part in PARTS.items():
        n = runs[0]["base"][f"n{suffix}"]
        lines += [f"| {part} (n = {n}) | {' | '.join(METRICS.values())} |", "|---" * (len(METRICS) + 1) + "|"]
        for system, name in SYSTEMS.items():
            cells = [spread([run[system][f"{metric}{suffix}"] for run in runs]) for metric in METRICS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def against_stage_1(runs: list[dict[str, dict[str, float]]]) -> str:
    """In how many of the seeds each system of stage 2 is better than the adapter that it began with, on the whole split."""
    signs = {"ece": -1, "brier": -1, "auroc": 1}
    heads = " | ".join(METRICS[metric] for metric in signs)
    lines = [f"| better than SFT, of {len(runs)} seeds | {heads} |", "|---|---|---|---|"]
    for system in STAGE_2:
        wins = [sum(sign * (run[system][m] - run["sft"][m]) > 0 for run in runs) for m, sign in signs.items()]
        lines.append(f"| {SYSTEMS[system]} | {' | '.join(map(str, wins))} |")
    return "\n".join(lines)


def against_recalibration(folders: list[Path]) -> str:
    """The base model recalibrated against the adapter of stage 2 as it is, for each seed."""
    lines = ["| seed | metric | base, isotonic | SFT + DPO, as stated | intervals |", "|---|---|---|---|---|"]
    for folder in folders:
        systems = [s for s in read_systems([str(folder)]) if s.name in ("base", "dpo")]
        rows = compare(systems, Comparison({})).rows
        base, ours = (_row(rows, *wanted) for wanted in (("base", "isotonic"), ("dpo", RAW)))
        for metric in ("auroc", "aurc", "brier", "ece"):
            one, other = base.metrics[metric], ours.metrics[metric]
            apart = one.high < other.low or other.high < one.low
            values = [cell(row, metric).removesuffix("*") for row in (base, ours)]
            seed = folder.name.removeprefix("eval-")
            lines.append(f"| {seed} | {metric} | {' | '.join(values)} | {'apart' if apart else 'overlap'} |")
    return "\n".join(lines)


def _row(rows: list[Row], system: str, recalibration: str) -> Row:
    found = (
        r for r in rows if (r.system, r.estimator, r.recalibration) == (system, VERBALIZED, recalibration)
    )
    return next(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/demo"))
    parser.add_argument(
        "--resume", action="store_true", help="do not train again what --out holds, of the same settings"
    )
    args = parser.parse_args()
    runs = [run_seed(seed, args.out, args.resume) for seed in args.seeds]
    print(markdown(runs))
    print(f"{against_stage_1(runs)}\n")
    print(against_recalibration([args.out / f"eval-{seed}" for seed in args.seeds]))


if __name__ == "__main__":
    main()
