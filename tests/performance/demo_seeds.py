"""The demo over several seeds: `python -m tests.performance.demo_seeds` compares settings, `--test` prints the README's tables.

The preset of stage 2 is what `chosen` chooses on development scenes, of the settings that were tried on all seeds. With `--test`, the
systems of the README alone answer the test scenes, which no preset asks about, so that nothing can be chosen on them.

`--test` also compares with what needs no training: maps of the base model's own estimates, fitted on the calibration set and on the
labelled answers that stage 2 uses. Its p-values are those of a paired bootstrap over images. Each seed changes training noise, order of data, adapter initialisation and test noise; the
base model, its levels and the test scenes are fixed. Values are mean ± standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from tests.performance.machine import spread

from vlm_calibration.estimators.predictions import read_predictions
from vlm_calibration.estimators.recalibration import recalibrated
from vlm_calibration.estimators.teacher import taught_confidences
from vlm_calibration.metrics import functional
from vlm_calibration.records import VERBALIZED
from vlm_calibration.reporting.report.data import read_systems
from vlm_calibration.reporting.report.table import ImageBootstrap, Measured, p_value

PREFERENCE = "vlm_calibration.losses.preference."
DISTRIBUTION = "vlm_calibration.losses.distribution."
PAPER = ["--config", "configs/experiment/paper.yaml"]
CLEAN = "--data.noise.clean_fraction"
LINEAR = "vlm_calibration.perturbation.levels.LinearLevels"
STAGE_1 = {
    "sft-paper": PAPER,
    "sft": [],
    "without-likelihoods": ["--data.noise.levels.init_args.likelihoods", "null"],
}
# Stage 1 with one setting of the paper's preset each, but `resolution: native`: the demo's files have the model's resolution.
ABLATIONS = {
    "linear-levels": ["--data.noise.levels", LINEAR],
    "noise-alone": ["--data.noise.kinds", '{"noise": 1}'],
    "fewer-untouched": [CLEAN, "0.0"],
    "no-wrong-answers": ["--data.noise.wrong_answer_rate", "0.0"],
    "no-distractors": ["--data.noise.distractor_probability", "0.0"],
    "constant-answer-weight": ["--model.init_args.answer_weight", "constant"],
    "confidence-weight-1": ["--model.init_args.confidence_weight", "1.0"],
}
# Stage 1 without one kind of perturbation each, which its answers are then tested on.
KINDS = ("noise", "blur", "occlusion")
LEFT_OUT = {
    f"without-{left_out}": ["--data.noise.kinds", json.dumps({kind: 1 for kind in KINDS if kind != left_out})]
    for left_out in KINDS
}
# Stage 2 from the adapter of "sft", each with one thing changed.
LOSS = "--model.init_args.loss"
# At the default learning rate, losses whose gradient vanishes on a single level collapse to one.
SLOWER = ["--model.init_args.optimizer.lr", "1.0e-4"]
TARGET = "--model.init_args.pairs.target"
OPPOSITE_WEIGHT = f"{LOSS}.init_args.opposite_weight"
NO_OPPOSITES = ["--data.candidates.wrong_answer", "false"]
NARROW = [f"{LOSS}.init_args.width", "0.05", CLEAN, "0.35"]
ONE_ANSWER = [OPPOSITE_WEIGHT, "0.0", *NO_OPPOSITES, *NARROW]
STAGE_2 = {
    "dpo": [],
    "clean-0.35": [CLEAN, "0.35"],
    "clean-0.7": [CLEAN, "0.7"],
    "narrow": NARROW,
    "one-answer": ONE_ANSWER,
    "opposites-1": [OPPOSITE_WEIGHT, "1.0"],
    "target-expected": [TARGET, "expected"],
    "target-likelihood": [TARGET, "likelihood"],
    "target-level": [TARGET, "level"],
    "target-correct": [TARGET, "correct"],
    "map-isotonic": ["--model.init_args.teacher", '{"features": ["likelihood"], "map": "isotonic"}'],
    "gold-answers": [*ONE_ANSWER, "--data.candidates.answers", "gold", TARGET, "expected"],
    "grid-10": ["--data.candidates.grid", "10"],
    "tokenized-brier": [LOSS, f"{DISTRIBUTION}TokenizedBrier", TARGET, "correct", *NO_OPPOSITES, *SLOWER],
    "expected-brier": [LOSS, f"{DISTRIBUTION}ExpectedBrier", *NO_OPPOSITES, *SLOWER],
    "rlcr": [LOSS, f"{DISTRIBUTION}RLCR", *SLOWER],
    "preferred": [LOSS, f"{PREFERENCE}DPO", f"{LOSS}.init_args.beta", "0.3", *NO_OPPOSITES],
    "ordinal": [LOSS, f"{PREFERENCE}Ordinal", f"{LOSS}.init_args.beta", "0.3", *NO_OPPOSITES],
    "listwise": [LOSS, f"{PREFERENCE}Listwise", f"{LOSS}.init_args.beta", "0.3", *NO_OPPOSITES],
    "level-dpo": ["--config", "configs/experiment/level_dpo.yaml"],
}
# Stage 2 from the adapter of "sft-paper", at the learning rate of the Makefile; at the default one it collapses.
STAGE_2_PAPER = {
    "dpo-paper": [
        *(*PAPER, "--config", "configs/experiment/paper_dpo.yaml"),
        *("--model.init_args.optimizer.lr", "3.0e-5"),
    ]
}
# Stage 2 from the base model, with a new adapter of stage 1's size on as many steps as both stages together need.
ALONE = [
    *("--model.init_args.adapter", "null", "--model.init_args.reference", "base"),
    *("--model.init_args.parts", "null"),
    *("--data.train.init_args.first", "0", "--data.train.init_args.scenes", "4000"),
    *("--model.init_args.lora", '{"dropout": 0.0, "parts": ["language", "projector"]}'),
]
STAGE_2_ALONE = {"alone": ALONE, "alone-untouched": [*ALONE, CLEAN, "1.0"]}
UNTRAINED = ("base", "oracle")
REPORTED = ("base", "sft", "dpo", "oracle")
STATED = (
    *("alone-untouched", "alone", "sft-paper", "dpo-paper", "clean-0.35", "one-answer"),
    *("without-likelihoods", *ABLATIONS),
)
"""The systems that answer the test scenes, once their settings are chosen; of the second, only what they state."""
PARTS_OF_EVALUATION = yaml.safe_load(Path("configs/eval/demo.yaml").read_text())["data"]["test"]
NO_PROBES = ["--model.init_args.probes", "[]"]
TEACHER = {
    "source": {
        "class_path": "vlm_calibration.demo.source.DemoSource",
        "init_args": {"split": "calibration", "scenes": 400, "first": 10_000, "hard": 0.3},
    },
    "noise": "drawn",
}
"""The labelled answers that stage 2 fits its teacher on, for every system's maps as well."""
STATED_ALONE = ["--model.init_args.estimators", "[]", "--data.calibration", "null"]
SYSTEMS = {
    "base": "base",
    "sft-paper": "SFT, paper's preset",
    "dpo-paper": "SFT + SimPO, paper's preset",
    "sft": "SFT",
    "alone-untouched": "stage 2 alone, untouched images",
    "alone": "stage 2 alone",
    "dpo": "SFT + stage 2: soft labels for both answers, fitted teacher",
    "clean-0.35": "`clean_fraction: 0.35`",
    "clean-0.7": "`clean_fraction: 0.7`",
    "narrow": "`clean_fraction: 0.35`, `width: 0.05`",
    "one-answer": "`clean_fraction: 0.35`, `width: 0.05`, soft labels for the own answer alone (`opposite_weight: 0`)",
    "opposites-1": "`opposite_weight: 1`",
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
    "constant-answer-weight": "`answer_weight: constant`",
    "confidence-weight-1": "`confidence_weight: 1`",
    "without-likelihoods": "levels without likelihoods",
    "sft-paper": "SFT, paper's preset: all of these",
    **{f"without-{kind}": f"without {kind}" for kind in KINDS},
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


def run_seed(seed: int, root: Path, systems: Sequence[str], *, resume: bool, test: bool) -> Metrics:
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
    stage_2 = {
        **fits("dpo", STAGE_2_PAPER, "sft-paper"),
        **fits("dpo", STAGE_2, "sft"),
        **fits("dpo", STAGE_2_ALONE),
    }
    train({**fits("sft", ABLATIONS), **fits("sft", LEFT_OUT), **stage_2}, resume)
    metrics = {}
    for estimated in (False, True) if test else (False,):
        of_these = [s for s in systems if (s in REPORTED) == estimated or not test]
        adapters = {s: str(folders[s] / "adapter") for s in of_these if s in folders}
        evaluated = evaluation(root, seed, test, estimated)
        finish(
            start(
                *(
                    "test",
                    "--config",
                    "configs/eval/demo.yaml",
                    "--config",
                    "configs/eval/demo_estimators.yaml",
                ),
                *(test_scenes() if test else []),
                *(*own, *into(evaluated), "--overwrite", *NO_PROBES),
                *("--model.init_args.adapters", json.dumps(adapters)),
                *([f"--data.calibration.teacher={json.dumps(TEACHER)}"] if estimated else STATED_ALONE),
                threads=2,
            )
        )
        metrics |= {s: json.loads((evaluated / s / "metrics.json").read_text()) for s in of_these}
    return metrics


def test_scenes() -> list[str]:
    """The parts of `eval/demo` on scenes that no preset asks about."""
    parts = copy.deepcopy(PARTS_OF_EVALUATION)
    for part in parts.values():
        part["source"]["init_args"]["split"] = "test"
    return [f"--data.test={json.dumps(parts)}"]


def chosen(runs: list[Metrics], candidates: Iterable[str]) -> str:
    """The system whose stated confidence has the lowest Brier score on the whole split, averaged over the seeds.

    Only of those with at most 0.1% of unparsed answers and an accuracy within a point of the base model's on every part.
    """

    def mean(system: str, metric: str) -> float:
        return statistics.mean(run[system][metric] for run in runs)

    allowed = [
        system
        for system in candidates
        if mean(system, "parse_failure_rate") <= 0.001
        and all(mean(system, f"accuracy{p}") >= mean("base", f"accuracy{p}") - 0.01 for p in PARTS)
    ]
    return min(allowed, key=lambda system: mean(system, "brier"), default="none")


def evaluation(root: Path, seed: int, test: bool, estimated: bool = False) -> Path:
    return root / f"{'test' if test else 'eval'}{'-estimated' if estimated else ''}-{seed}"


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


def left_out(folders: list[Path]) -> str:
    """A table of each kind's perturbed answers: trained on all kinds, on noise alone, and on all but this one."""
    names = {"ece": "ECE", "brier": "Brier", "auroc": "AUROC"}
    functions = (functional.expected_calibration_error, functional.brier_score, functional.auroc)
    lines = [f"| tested on | trained on | {' | '.join(names.values())} |", "|---|---|---|---|---|"]
    for kind in KINDS:
        rows = {"sft": "all kinds", "noise-alone": "noise alone", f"without-{kind}": f"all but {kind}"}
        for system, title in rows.items():
            values = []
            for folder in folders:
                predictions = read_predictions(folder / system / "predictions.jsonl")
                stated = [(p.confidence, p.correct) for p in predictions if p.perturbation == kind]
                read = [(confidence, correct) for confidence, correct in stated if confidence is not None]
                confidences, correct = (torch.tensor(column) for column in zip(*read, strict=True))
                values.append([float(function(confidences, correct)) for function in functions])
            cells = [spread(list(column)) for column in zip(*values, strict=True)]
            lines.append(f"| {kind} | {title} | {' | '.join(cells)} |")
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


class Confidence(NamedTuple):
    """A confidence of a system: an estimator, and the map that recalibrates it, if any."""

    system: str
    estimator: str = VERBALIZED
    recalibration: str | None = None


CONFIDENCES = {
    Confidence("base"): "base, as stated",
    Confidence("base", recalibration="platt"): "base, as stated, Platt",
    Confidence("base", "likelihood"): "base, likelihood of its answer",
    Confidence("base", "likelihood", "platt"): "base, likelihood, Platt",
    Confidence("oracle"): "level oracle, which is told the perturbation",
    Confidence("alone-untouched"): "stage 2 alone on untouched images, as stated",
    Confidence("alone"): "stage 2 alone, as stated",
    Confidence("sft-paper"): "paper's preset, stage 1, as stated",
    Confidence("dpo-paper"): "paper's preset, both stages, as stated",
    Confidence("sft"): "stage 1, as stated",
    Confidence("sft", "expected"): "stage 1, expected",
    Confidence("dpo"): "**both stages, as stated**",
    Confidence("dpo", "expected"): "both stages, expected",
    Confidence("clean-0.35"): "both stages, `clean_fraction: 0.35`, as stated",
    Confidence("one-answer"): "both stages, soft labels for the own answer alone, as stated",
    Confidence("sft", "teacher"): "the teacher of stage 2, of stage 1's likelihood and expected confidence",
}
"""The rows of the README's table."""
AGAINST = (Confidence("base", "likelihood", "platt"), Confidence("sft", "teacher"))


def measure(root: Path, seed: int) -> dict[Confidence, Measured]:
    """Each of `CONFIDENCES` of one seed on the test scenes, all with the same draws of images."""
    systems = {
        system.name: system
        for estimated in (False, True)
        for system in read_systems([str(evaluation(root, seed, True, estimated))])
    }
    measured = {}
    for confidence in CONFIDENCES:
        system, estimator = systems[confidence.system], confidence.estimator
        values: list[float | None]
        if estimator == "teacher":
            assert system.calibration is not None
            values = taught_confidences(system.predictions, system.calibration)
        elif confidence.recalibration is None:
            values = [p.confidence_of(estimator) for p in system.predictions]
        else:
            assert system.calibration is not None
            values = list(
                recalibrated(confidence.recalibration, system.predictions, estimator, system.calibration)
            )
        measured[confidence] = ImageBootstrap(system.predictions).measure(values)
    return measured


def as_a_table(seeds: list[dict[Confidence, Measured]]) -> str:
    """Metrics of each of `CONFIDENCES` on the whole split, over the seeds."""
    names = ("mean_confidence", *METRICS)
    heads = " | ".join(METRICS.get(name, "mean confidence") for name in names)
    lines = [f"| whole split | {heads} |", "|---" * (len(names) + 1) + "|"]
    for confidence, title in CONFIDENCES.items():
        cells = [spread([measured[confidence].intervals[name].value for measured in seeds]) for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def against(other: Confidence, seeds: list[dict[Confidence, Measured]]) -> str:
    """What stage 2 states, less another confidence, with p-values of a paired bootstrap over images, for each seed."""
    lines = [
        f"| stage 2, as stated, less {CONFIDENCES[other]} | Brier | p | AUROC | p |",
        "|---|---|---|---|---|",
    ]
    for seed, measured in enumerate(seeds):
        stated, less = measured[Confidence("dpo")], measured[other]
        cells = []
        for name in ("brier", "auroc"):
            difference = stated.intervals[name].value - less.intervals[name].value
            cells += [f"{difference:+.3f}", f"{p_value(stated, less, name):.3f}"]
        lines.append(f"| run {seed + 1} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    all_systems = list({**SYSTEMS, **ABLATED})
    needed = ("base", "sft")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/demo"))
    parser.add_argument(
        "--resume", action="store_true", help="reuse adapters in --out; they must have the same settings"
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=sorted({*all_systems} - {*needed}),
        help="compare these alone with base and sft; default: all",
    )
    parser.add_argument(
        "--test", action="store_true", help="answer the test scenes, with the systems of the README alone"
    )
    args = parser.parse_args(arguments)
    if args.test and args.systems:
        parser.error(
            f"--test takes no --systems {' '.join(args.systems)}: settings are chosen on development scenes; the test scenes are "
            f"for {', '.join((*REPORTED, *STATED))}"
        )
    compared = [name for name in all_systems if args.systems is None or name in {*needed, *args.systems}]
    systems = (*REPORTED, *STATED) if args.test else compared
    runs = [run_seed(seed, args.out, systems, resume=args.resume, test=args.test) for seed in args.seeds]
    print(markdown(runs, SYSTEMS))
    print("SFT with one thing as in the paper's preset:\n")
    print(markdown(runs, ABLATED))
    print(f"{against_sft(runs, {name: ABLATED[name] for name in ('without-likelihoods', *ABLATIONS)})}\n")
    if not args.test:
        print(f"{against_sft(runs, {name: SYSTEMS[name] for name in STAGE_2})}\n")
        candidates = [name for name in (*STAGE_2, *STAGE_2_ALONE) if name in runs[0]]
        print(f"Chosen of {', '.join(candidates)}, with {len(runs)} seeds: {chosen(runs, candidates)}\n")
        if {"noise-alone", *LEFT_OUT} <= {*systems}:
            print(f"{left_out([evaluation(args.out, seed, test=False) for seed in args.seeds])}\n")
    else:
        seeds = [measure(args.out, seed) for seed in args.seeds]
        print("\n\n".join([as_a_table(seeds), *(against(other, seeds) for other in AGAINST)]))


if __name__ == "__main__":
    main()
