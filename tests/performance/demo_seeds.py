"""The demo over several seeds: `python -m tests.performance.demo_seeds` compares settings, `--test` prints the README's tables.

Settings are chosen on development scenes, by this rule: of the settings with at most 0.1% of unparsed answers and an accuracy within a
point of the base model's on every part, the one whose stated confidence has the lowest Brier score on the whole split, averaged over
the seeds. With `--test`, the systems of the README alone answer the test scenes, so that nothing can be chosen on them.

The last table compares with an isotonic map of the base model's confidence, which needs no training: it improves calibration and
does not improve ranking. Intervals that do not overlap are "apart". Each seed changes training noise, order of data, adapter
initialisation and test noise; the base model, its levels and the test scenes are fixed. Values are mean ± standard deviation over
seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlm_calibration.estimators.predictions import VERBALIZED
from vlm_calibration.reporting.report.data import read_systems
from vlm_calibration.reporting.report.table import RAW, Comparison, Row, cell, compare

PREFERENCE = "vlm_calibration.losses.preference."
DISTRIBUTION = "vlm_calibration.losses.distribution."
PAPER = ["--config", "configs/experiment/paper.yaml"]
LINEAR = "vlm_calibration.perturbation.levels.LinearLevels"
STAGE_1 = {"sft-paper": PAPER, "sft": []}
# Stage 1 with one setting of the paper's preset each.
ABLATIONS = {
    "linear-levels": ["--data.noise.levels", LINEAR],
    "noise-alone": ["--data.noise.kinds", '{"noise": 1}'],
    "fewer-untouched": ["--data.noise.clean_fraction", "0.0"],
    "no-wrong-answers": ["--data.noise.wrong_answer_rate", "0.0"],
    "no-distractors": ["--data.noise.distractor_probability", "0.0"],
    "native-resolution": ["--data.noise.resolution", "native"],
    "constant-answer-weight": ["--model.init_args.answer_weight", "constant"],
    "confidence-weight-1": ["--model.init_args.confidence_weight", "1.0"],
}
# Stage 2 from the adapter of "sft", each with one thing changed.
LOSS = "--model.init_args.loss"
# At the default learning rate, losses whose gradient vanishes on a single level collapse to one.
SLOWER = ["--model.init_args.optimizer.lr", "1.0e-4"]
TARGET = "--model.init_args.pairs.target"
STAGE_2 = {
    "dpo": [],
    "target-expected": [TARGET, "expected"],
    "target-likelihood": [TARGET, "likelihood"],
    "target-level": [TARGET, "level"],
    "target-correct": [TARGET, "correct"],
    "map-isotonic": ["--model.init_args.teacher", '{"features": ["likelihood"], "map": "isotonic"}'],
    "gold-answers": ["--data.candidates.answers", "gold", TARGET, "expected"],
    "grid-10": ["--data.candidates.grid", "10"],
    "tokenized-brier": [LOSS, f"{DISTRIBUTION}TokenizedBrier", TARGET, "correct", *SLOWER],
    "expected-brier": [LOSS, f"{DISTRIBUTION}ExpectedBrier", *SLOWER],
    "rlcr": [LOSS, f"{DISTRIBUTION}RLCR", "--data.candidates.wrong_answer", "true", *SLOWER],
    "preferred": [LOSS, f"{PREFERENCE}DPO", f"{LOSS}.init_args.beta", "0.3"],
    "ordinal": [LOSS, f"{PREFERENCE}Ordinal", f"{LOSS}.init_args.beta", "0.3"],
    "listwise": [LOSS, f"{PREFERENCE}Listwise", f"{LOSS}.init_args.beta", "0.3"],
    "level-dpo": ["--config", "configs/experiment/level_dpo.yaml"],
}
# Stage 2 from the adapter of "sft-paper", at the learning rate of the Makefile; at the default one it collapses.
STAGE_2_PAPER = {
    "dpo-paper": [
        *(*PAPER, "--config", "configs/experiment/paper_dpo.yaml"),
        *("--model.init_args.optimizer.lr", "3.0e-5"),
    ]
}
UNTRAINED = ("base", "oracle")
REPORTED = ("base", "sft-paper", "dpo-paper", "sft", "dpo", "oracle")
"""The systems that answer the test scenes, once their settings are chosen."""
DEVELOPMENT = ["--config", "configs/eval/demo_development.yaml"]
SYSTEMS = {
    "base": "base",
    "sft-paper": "SFT, paper's preset",
    "dpo-paper": "SFT + SimPO, paper's preset",
    "sft": "SFT",
    "dpo": "SFT + stage 2: soft labels, fitted teacher, own answers",
    "target-expected": "`target: expected`",
    "target-likelihood": "`target: likelihood`",
    "target-level": "`target: level`",
    "target-correct": "`target: correct`",
    "map-isotonic": "isotonic map of the likelihood",
    "gold-answers": "`answers: gold`, `target: expected`",
    "grid-10": "`grid: 10`",
    "tokenized-brier": "tokenized Brier score, `target: correct`",
    "expected-brier": "expected Brier score",
    "rlcr": "RLCR",
    "preferred": "DPO for the fitted target",
    "ordinal": "ordinal",
    "listwise": "listwise",
    "level-dpo": "DPO for the level, gold answers (`experiment/level_dpo`)",
    "oracle": "level oracle",
}
ABLATED = {
    "sft": "SFT",
    "linear-levels": "linear levels",
    "noise-alone": "noise alone (`kinds: {noise: 1}`)",
    "fewer-untouched": "fewer untouched images (`clean_fraction: 0`)",
    "no-wrong-answers": "no wrong answers (`wrong_answer_rate: 0`)",
    "no-distractors": "no distractors (`distractor_probability: 0`)",
    "native-resolution": "noise at the file's resolution (`resolution: native`)",
    "constant-answer-weight": "`answer_weight: constant`",
    "confidence-weight-1": "`confidence_weight: 1`",
    "sft-paper": "SFT, paper's preset: all of these",
}
PARTS = {
    "": "whole split",
    "/clean": "clean",
    "/natural": "natural",
    "/foreign": "foreign",
    "/perturbed": "perturbed",
    "/shifted": "shifted",
    "/existence": "existence (yes/no)",
    "/position": "corner (short)",
}
Metrics = dict[str, dict[str, float]]
"""System -> metrics by name."""
METRICS = {
    "accuracy": "accuracy",
    "ece": "ECE",
    "brier": "Brier",
    "auroc": "AUROC",
    "parse_failure_rate": "unparsed",
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


def train(fits: dict[Path, list[str]], resume: bool) -> None:
    """Train an adapter into each folder, two at a time as in `make demo`; with `resume`, only missing ones."""
    missing = {f: fit for f, fit in fits.items() if not (resume and (f / "adapter").is_dir())}
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda folder: finish(start("fit", *missing[folder], *into(folder), "--overwrite")), missing
            )
        )


def run_seed(seed: int, root: Path, systems: list[str], *, resume: bool, test: bool) -> Metrics:
    """Train the systems with this seed and evaluate them on development or test scenes; returns their metrics."""
    own = ["--seed_everything", str(seed), "--data.noise.seed", str(seed)]
    folders = {name: root / f"{name}-{seed}" for name in systems if name not in UNTRAINED}

    def fits(stage: str, runs: dict[str, list[str]], start_from: str | None = None) -> dict[Path, list[str]]:
        adapter = f"--model.init_args.adapter={root / f'{start_from}-{seed}' / 'adapter'}"
        shared = ["--config", f"configs/{stage}.yaml"]
        return {
            folders[name]: [*shared, *settings, *own, *([adapter] if start_from else [])]
            for name, settings in runs.items()
            if name in folders
        }

    train(fits("sft", STAGE_1), resume)
    stage_2 = {**fits("dpo", STAGE_2_PAPER, "sft-paper"), **fits("dpo", STAGE_2, "sft")}
    train({**fits("sft", ABLATIONS), **stage_2}, resume)
    evaluated = evaluation(root, seed, test)
    adapters = json.dumps({name: str(folder / "adapter") for name, folder in folders.items()})
    finish(
        start(
            *("test", "--config", "configs/eval/demo.yaml", *([] if test else DEVELOPMENT)),
            *(*own, *into(evaluated)),
            *("--model.init_args.adapters", adapters),
            *("--model.init_args.estimators", "[]", "--model.init_args.probes", "[]"),
            *("--model.init_args.probes", "[]"),
            threads=2,
        )
    )
    return {s: json.loads((evaluated / s / "metrics.json").read_text()) for s in systems}


def evaluation(root: Path, seed: int, test: bool) -> Path:
    return root / f"{'test' if test else 'eval'}-{seed}"


def spread(values: list[float | None]) -> str:
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "-"
    mean = f"{statistics.mean(numbers):.3f}"
    return f"{mean} ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else mean


def markdown(runs: list[Metrics], titles: dict[str, str]) -> str:
    """A table for each part of the test set, with a row for each of these systems that has results."""
    lines = []
    for suffix, part in PARTS.items():
        n = runs[0]["base"][f"n{suffix}"]
        lines += [f"| {part} (n = {n}) | {' | '.join(METRICS.values())} |", "|---" * (len(METRICS) + 1) + "|"]
        for system, name in titles.items():
            if system in runs[0]:
                cells = [spread([run[system][f"{metric}{suffix}"] for run in runs]) for metric in METRICS]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def against_sft(runs: list[Metrics], titles: dict[str, str]) -> str:
    """Number of seeds in which each system is better than "sft" on the whole split."""
    signs = {"ece": -1, "brier": -1, "auroc": 1}
    heads = " | ".join(METRICS[metric] for metric in signs)
    lines = [f"| better than SFT, of {len(runs)} seeds | {heads} |", "|---|---|---|---|"]
    for system in titles:
        if system in runs[0]:
            wins = [sum(sign * (r[system][m] - r["sft"][m]) > 0 for r in runs) for m, sign in signs.items()]
            lines.append(f"| {titles[system]} | {' | '.join(map(str, wins))} |")
    return "\n".join(lines)


def against_recalibration(folders: list[Path]) -> str:
    """The recalibrated base model against the adapter of stage 2 without recalibration, for each seed."""
    lines = ["| seed | metric | base, isotonic | SFT + DPO, as stated | intervals |", "|---|---|---|---|---|"]
    for folder in folders:
        systems = [s for s in read_systems([str(folder)]) if s.name in ("base", "dpo")]
        rows = compare(systems, Comparison()).rows
        base, dpo = _row(rows, "base", "isotonic"), _row(rows, "dpo", RAW)
        for metric in ("auroc", "aurc", "brier", "ece"):
            first, second = base.metrics[metric], dpo.metrics[metric]
            apart = first.high < second.low or second.high < first.low
            values = [cell(row, metric).removesuffix("*") for row in (base, dpo)]
            seed = folder.name.rsplit("-", 1)[1]
            lines.append(f"| {seed} | {metric} | {' | '.join(values)} | {'apart' if apart else 'overlap'} |")
    return "\n".join(lines)


def _row(rows: list[Row], system: str, recalibration: str) -> Row:
    key = (system, VERBALIZED, recalibration)
    return next(r for r in rows if (r.system, r.estimator, r.recalibration) == key)


def main(arguments: list[str] | None = None) -> None:
    all_systems = list({**SYSTEMS, **ABLATED})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/demo"))
    parser.add_argument(
        "--resume", action="store_true", help="reuse adapters in --out; they must have the same settings"
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=sorted({*all_systems} - {"sft", "sft-paper", "dpo", *UNTRAINED}),
    )
    parser.add_argument(
        "--test", action="store_true", help="answer the test scenes, with the systems of the README alone"
    )
    args = parser.parse_args(arguments)
    if args.test and args.without:
        parser.error(
            f"--test takes no --without {' '.join(args.without)}: settings are chosen on development scenes; the test scenes are "
            f"for {', '.join(REPORTED)}"
        )
    systems = [name for name in (REPORTED if args.test else all_systems) if name not in args.without]
    runs = [run_seed(seed, args.out, systems, resume=args.resume, test=args.test) for seed in args.seeds]
    print(markdown(runs, SYSTEMS))
    if not args.test:
        print(f"{against_sft(runs, {name: SYSTEMS[name] for name in STAGE_2})}\n")
        print("SFT with one thing as in the paper's preset:\n")
        print(markdown(runs, ABLATED))
        print(f"{against_sft(runs, {name: ABLATED[name] for name in ABLATIONS})}\n")
    print(against_recalibration([evaluation(args.out, seed, args.test) for seed in args.seeds]))


if __name__ == "__main__":
    main()
